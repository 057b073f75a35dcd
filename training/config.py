"""A training run's configuration: one tree of frozen dataclasses, read from YAML.

Every setting is documented in its class's docstring, as `name: what it is.`; `documented` prints the tree
with these texts as YAML that `read_config` reads.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..models.bridge import BridgeSettings
from ..models.sites import SiteKey
from .settings import TrainSettings
from .sources import DataConfig

DEVICES = ("auto", "cuda")


def _at_least(settings: Any, lowest: int, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < lowest:
            raise ValueError(f"{name} is {getattr(settings, name)} but must be {lowest} or more")


@dataclass(frozen=True)
class BridgeConfig:
    """The bridge that is learned.

    rank: of the LoRA updates, from 1. alpha: their scale is alpha / rank. direction: `edit_queries` or
    `reference_queries`, whose queries ask. fusion: `linear`, `add` or `replace`, how the answer joins the
    self-attention. reference_self_bridge: whether the reference's own rows pass through the bridge too, as in
    the authors' code.
    """

    rank: int = 64
    alpha: float = 64.0
    direction: str = "reference_queries"
    fusion: str = "linear"
    reference_self_bridge: bool = False

    def __post_init__(self) -> None:
        self.settings("any base", {("middle", 0, 0): 1})

    def settings(self, base: str, widths: Mapping[SiteKey, int]) -> BridgeSettings:
        return BridgeSettings(
            base, widths, self.rank, self.alpha, self.direction, self.fusion, self.reference_self_bridge
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run that was stopped goes on from.

    every: steps from one checkpoint to the next. keep: how many of the last are kept.
    """

    every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep")


@dataclass(frozen=True)
class ValidationConfig:
    """Fixed edits, sampled with what the bridge has learned so far, as a picture.

    every: steps from one picture to the next, 0 for none. folder: of edit pairs to show; empty for the first
    pairs of the training data. count: how many edits. steps: of the sampler. image_guidance, text_guidance:
    the two scales of dual guidance.
    """

    every: int = 1000
    folder: str = ""
    count: int = 4
    steps: int = 20
    image_guidance: float = 1.5
    text_guidance: float = 7.5

    def __post_init__(self) -> None:
        _at_least(self, 0, "every")
        _at_least(self, 1, "count", "steps")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run says about itself.

    every: steps from one line, and one point of the curves, to the next. tensorboard: whether loss, gradient
    norm, learning rate and the validation pictures are written for TensorBoard, into the output folder.
    """

    every: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "every")


@dataclass(frozen=True)
class Config:
    """A run. Paths are relative to the folder that the command is started in.

    base: the base model, a checkpoint file of SD1.x or SD2.x with UNet, text encoder and VAE; or
    `tiny_studio`, the small model that ships. data: the edit pairs. output: the folder for checkpoints, the
    bridge and everything else that the run writes; with several machines, one that all of them see. cache:
    the folder of encoded pairs, which runs may share; empty for `encoded` in the output folder. steps: of
    the optimiser, in all. device: `auto`, a GPU where there is one; `cuda`, stop where there is none. bridge:
    what is learned. train: how. checkpoint: what a stopped run goes on from. validation: pictures on the way.
    logging: lines and curves on the way.
    """

    base: str
    data: DataConfig
    output: str = "bridge_training"
    cache: str = ""
    steps: int = 100_000
    device: str = "auto"
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r} but must be one of {', '.join(DEVICES)}")
        if not self.output:
            raise ValueError("output is empty but must be a folder")


def read_config(path: Path) -> Config:
    """A configuration from a YAML file.

    Raises ValueError, naming the setting by its dotted path, for one that is unknown (with the known one
    that is nearest), missing, of a wrong type, or impossible, and for a file that is not YAML.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from None
    try:
        return _tree(Config, found, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tree(kind: type, found: Any, path: str) -> Any:
    where = f"{path}." if path else ""
    if not isinstance(found, Mapping):
        raise ValueError(f"{path or 'the file'} is {_said(found)} but must be settings by name")
    hints = get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"the nearest is {where}{near[0]}" if near else f"there are {', '.join(known)}"
            raise ValueError(f"there is no setting {where}{name}; {hint}")
    missing = [name for name, entry in known.items() if name not in found and _default(entry) is MISSING]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing")
    values = {name: _value(hints[name], value, where + name) for name, value in found.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _value(kind: Any, found: Any, path: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _tree(kind, found, path)
    if origin in (Union, types.UnionType):
        for choice in inner:
            if _fits(choice, found):
                return _value(choice, found, path)
    elif _fits(kind, found):
        if kind is float:
            return float(found)
        return tuple(found) if origin is Sequence else found
    hint = ": put it in quotes" if kind is str and isinstance(found, bool) else ""  # YAML's off, on, yes, no
    raise ValueError(f"{path} is {_said(found)} but must be {_named(kind)}{hint}")


def _fits(kind: Any, found: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Sequence:
        return isinstance(found, list) and all(_fits(inner[0], value) for value in found)
    if origin is Mapping:
        return isinstance(found, dict) and all(
            _fits(inner[0], name) and _fits(inner[1], value) for name, value in found.items()
        )
    if kind is float:
        # YAML takes 1e-5, without a point, for text.
        number = isinstance(found, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", found)
        return bool(number) or (isinstance(found, (int, float)) and not isinstance(found, bool))
    return isinstance(found, kind) and (kind is bool or not isinstance(found, bool))


def _said(found: Any) -> str:
    return "empty" if found is None else f"{found!r} ({type(found).__name__})"


def _named(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_named, inner))
    if origin is Sequence:
        return "a list of such"
    if origin is Mapping:
        return "texts by name"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def documentation(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field; entries for several fields are given to each."""
    names = "|".join(entry.name for entry in fields(kind))
    text = " ".join(inspect.getdoc(kind).split("\n\nRaises")[0].split())
    found: dict[str, list[str]] = {}
    starts = [*re.finditer(rf"(?:^|(?<=\. ))((?:{names})(?:, (?:{names}))*): ", text)]
    ends = [*(match.start() for match in starts[1:]), len(text)]
    for match, end in zip(starts, ends, strict=True):
        for name in match[1].split(", "):
            found.setdefault(name, []).append(text[match.end() : end].strip().rstrip("."))
    return {name: ". ".join(texts) for name, texts in found.items()}


def documented() -> str:
    """All settings with their defaults and what they are, as YAML; those without a default are empty."""
    return "\n".join(_documented(Config, "")) + "\n"


def _documented(kind: type, indent: str) -> Iterator[str]:
    hints, texts = get_type_hints(kind), documentation(kind)
    for entry in fields(kind):
        inner, default = hints[entry.name], _default(entry)
        text = texts[entry.name]
        if default is MISSING and not is_dataclass(inner):
            text += ". Must be given"
        yield from textwrap.wrap(text, 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if is_dataclass(inner):
            yield f"{indent}{entry.name}:"
            yield from _documented(inner, f"{indent}  ")
        else:
            dumped = "" if default is MISSING else yaml.safe_dump([default], default_flow_style=True)
            yield f"{indent}{entry.name}: {dumped.strip()[1:-1]}".rstrip()


def _default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
