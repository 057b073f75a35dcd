"""A training run's configuration: one tree of settings, read from YAML and checked by pydantic."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..models.bridge import BridgeOptions
from .settings import STRICT, DataConfig, TrainSettings


@dataclass(frozen=True, config=STRICT)
class BridgeConfig(BridgeOptions):
    """The trained bridge."""


@dataclass(frozen=True, config=STRICT)
class EncoderFiles:
    """Files of what `base` does not hold, if it is the network alone, as Flux.2 and Chroma come."""

    text_encoders: tuple[str, ...] = Field(
        (), description="The files of the text encoder, such as those of CLIP-L and T5 for Flux.1."
    )
    type: Literal["stable_diffusion", "flux", "flux2", "chroma", "sd3", "qwen_image"] = Field(
        "flux", description="What the text encoder is for, as in ComfyUI's node Load CLIP."
    )
    vae: str = Field("", description="The file of the VAE.")

    def named(self) -> list[tuple[str, Path]]:
        """The files, each with the name of its setting."""
        texts = [("encoders.text_encoders", Path(file)) for file in self.text_encoders]
        return [*texts, *([("encoders.vae", Path(self.vae))] if self.vae else [])]


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """Checkpoints, from which a stopped run continues."""

    every: int = Field(1000, ge=1, description="Steps from one checkpoint to the next.")
    keep: int = Field(3, ge=1, description="How many of the last checkpoints are kept.")


@dataclass(frozen=True, config=STRICT)
class ValidationConfig:
    """Fixed edits, sampled with what the bridge has learned so far."""

    every: int = Field(1000, ge=0, description="Steps from one image to the next, 0 for none.")
    folder: str = Field(
        "", description="A folder of edit pairs to show; empty for the first pairs of the training data."
    )
    count: int = Field(4, ge=1, description="How many edits.")
    steps: int = Field(20, ge=1, description="Of the sampler.")
    image_guidance: float = Field(1.5, description="Scale of dual guidance: how much of the source is kept.")
    text_guidance: float = Field(
        7.5,
        description="Scale of dual guidance: how closely the text is followed. Not for a model that has "
        "learned guidance, such as Flux.1 dev.",
    )


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    """What a run reports."""

    every: int = Field(10, ge=1, description="Steps from one line, and one point of the curves, to the next.")
    tensorboard: bool = Field(
        True,
        description="Whether loss, gradient norm, learning rate and the validation images are written for "
        "TensorBoard, into the output folder.",
    )


@dataclass(frozen=True, config=STRICT)
class Config:
    """A run. Paths are relative to the folder that the command is started in."""

    base: str = Field(
        description="The base model: a checkpoint file of SD1.x, SD2.x, SDXL, Flux or Chroma, with text "
        "encoder and VAE or as the network alone; or tiny_studio, the small model that ships.",
    )
    data: DataConfig = Field(description="The edit pairs.")
    encoders: EncoderFiles = Field(
        default_factory=EncoderFiles,
        description="Files of what `base` does not hold, if it is the network alone.",
    )
    output: str = Field(
        "bridge_training",
        min_length=1,
        description="The folder for everything that the run writes; with several machines, one that all of "
        "them see.",
    )
    cache: str = Field(
        "",
        description="The folder of encoded pairs, which runs may share; empty for `encoded` in the output "
        "folder.",
    )
    steps: int = Field(100_000, ge=1, description="Of the optimiser, in all.")
    device: Literal["auto", "cuda"] = Field(
        "auto", description="auto: a GPU where there is one. cuda: stop where there is none."
    )
    bridge: BridgeConfig = Field(default_factory=BridgeConfig, description="The bridge that is learned.")
    train: TrainSettings = Field(default_factory=TrainSettings, description="How it is learned.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What a stopped run continues from."
    )
    validation: ValidationConfig = Field(
        default_factory=ValidationConfig,
        description="Fixed edits, sampled with what the bridge has learned so far, as an image.",
    )
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="What the run reports.")


class _Loader(yaml.SafeLoader):
    """Reads 1e-5, without a point, as a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+e[-+]?\d+$"), "-+0123456789")


def read_config(path: Path) -> Config:
    """A configuration from a YAML file.

    Raises ValueError, naming the setting by its dotted path, for one that is unknown (with the known one
    that is nearest), missing, of a wrong type, or impossible, and for a file that is not YAML.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from None
    try:
        return TypeAdapter(Config).validate_json(json.dumps(found, default=str))
    except ValidationError as error:
        raise ValueError(f"{path}: {_readable(error)}") from None


def _readable(error: ValidationError) -> str:
    """The first problem in one line: which setting, what was found, what is allowed."""
    first = error.errors()[0]
    found = first["input"]
    # Without pydantic's own names for the text of a union and for the key of a mapping.
    parts = [str(part) for part in first["loc"] if part not in ("str", "[key]")]
    path = ".".join(parts)
    match first["type"]:
        case "missing":
            return f"{path} is missing"
        case "unexpected_keyword_argument":
            *sections, name = parts
            kind: Any = Config
            for section in sections:
                kind = kind.__pydantic_fields__[section].annotation
            known = kind.__pydantic_fields__
            if near := difflib.get_close_matches(name, known, 1):
                return f"there is no setting {path}; the nearest is {'.'.join([*sections, *near])}"
            return f"there is no setting {path}; there are {', '.join(known)}"
        case "value_error":
            return f"{path}{'.' if path else ''}{first['ctx']['error']}"
    said = "empty" if found is None else f"{found!r} ({type(found).__name__})"
    quoted = isinstance(found, bool) and first["type"] in ("string_type", "literal_error")
    hint = ": put it in quotes" if quoted else ""  # YAML's off, on, yes, no
    return f"{path or 'the file'} is {said} but {first['msg'].replace('Input should', 'must')}{hint}"


def documented() -> str:
    """All settings with their defaults and descriptions, as YAML. Settings without a default are empty."""
    return "\n".join(_documented(Config, "")) + "\n"


def _documented(kind: Any, indent: str) -> Iterator[str]:
    for name, entry in kind.__pydantic_fields__.items():
        section = is_dataclass(entry.annotation)
        text = entry.description + (" Must be given." if entry.is_required() and not section else "")
        yield from textwrap.wrap(text, 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if section:
            yield f"{indent}{name}:"
            yield from _documented(entry.annotation, f"{indent}  ")
        else:
            default = "" if entry.is_required() else yaml.safe_dump([entry.default], default_flow_style=True)
            yield f"{indent}{name}: {default.strip()[1:-1]}".rstrip()
