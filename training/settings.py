"""Settings of a training run that nodes and command share.

Invalid ones raise pydantic's ValidationError, which is a ValueError and names the setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Dropout = Literal["paper", "release", "none"]
DroppedImage = Literal["off", "white"]
Precision = Literal["fp32", "bf16", "fp16"]
Role = Literal["source_image", "edit_image", "source_text", "edit_text"]
DROPOUTS, DROPPED_IMAGES, ROLES = get_args(Dropout), get_args(DroppedImage), get_args(Role)
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# No type is converted into another one, and unknown settings are refused.
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Objective:
    """What a bridge learns, see `objective`."""

    dropout: Dropout = Field(
        "paper",
        description="paper: text and image are each dropped with drop_rate, independently. release: as in "
        "the authors' code, three bands of drop_rate each that exclude one another: no text and the "
        "reference itself as target; no image; neither. none: nothing is dropped.",
    )
    drop_rate: float = Field(0.05, ge=0, le=1 / 3, description="How often, 0 to 1/3.")
    dropped_image: DroppedImage = Field(
        "off",
        description="What a row without image gets. off: no bridge, as in sampling. white: a white reference "
        "without text.",
    )
    reference_time: Literal["zero", "same"] = Field(
        "zero",
        description="Timestep of the reference pass: zero, or the same as the edited image's, as in the "
        "authors' training.",
    )
    min_snr: float = Field(
        0.0, ge=0, description="Loss weight min(SNR, min_snr) / SNR (arXiv 2303.09556), 0 for none."
    )
    offset_noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of an offset added to each channel's noise, for a base that was "
        "trained with it. 0 for none, as in the paper.",
    )


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """How a bridge is trained. The defaults are the paper's where it gives them."""

    batch: int = Field(4, ge=1, description="Pairs per forward, from 1.")
    accumulate: int = Field(1, ge=1, description="Forwards per step, from 1.")
    optimiser: Literal["adamw", "muon"] = Field("adamw", description="adamw, or muon, which needs torch 2.9.")
    learning_rate: float = Field(1e-5, gt=0, description="The optimiser's, above 0.")
    weight_decay: float = Field(0.01, ge=0, description="The optimiser's, from 0.")
    decay: int = Field(
        0,
        ge=0,
        description="Steps over which the rate falls to zero along half a cosine, to start again from its "
        "peak (SGDR, arXiv 1608.03983). 0 for a constant rate.",
    )
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient, above 0.")
    precision: Precision = Field("fp32", description="fp32, or bf16 or fp16 by autocast.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the weights' moving average, from 0 (none) to below 1."
    )
    seed: int = Field(42, ge=0, le=2**64 - 1, description="Of order and noise, 0 to 2**64 - 1.")
    objective: Objective = Field(default_factory=Objective, description="What is learned.")
    checkpointing: bool = Field(
        False,
        description="Compute layers again for their gradient instead of keeping what they need for it: "
        "slower, with much less memory.",
    )

    def __post_init__(self) -> None:
        optimiser_class(self.optimiser)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if not self.decay:
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step % self.decay) / self.decay)) / 2


def optimiser_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimiser of a name from its weights, `lr` and `weight_decay`. Raises ValueError if this
    torch does not have it.
    """
    if name == "adamw":
        return torch.optim.AdamW
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ValueError(
            f"optimiser is 'muon', which needs torch 2.9 or newer, but this is {torch.__version__}: update "
            "torch, or take adamw"
        )
    # Its steps then have the size of AdamW's, and so has the rate that suits it.
    return partial(muon, adjust_lr_fn="match_rms_adamw")


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The training data."""

    path: str | Sequence[str] = Field(
        min_length=1,
        description="The folder; or shards or parquet files, as a pattern with {000..009} or *, or a list of "
        "such; or a data set's name on the hub, owner/name.",
    )
    kind: Literal["folder", "webdataset", "huggingface"] = Field(
        "folder",
        description="folder: name_source.png, name_edit.png and name.json for each pair. webdataset: tar "
        "shards. huggingface: a data set of the hub, a local folder or parquet files, which the library "
        "datasets reads.",
    )
    split: str = Field("train", description="Of a Hugging Face data set.")
    revision: str = Field(
        "", description="Of a Hugging Face data set: a commit of the hub, empty for the newest."
    )
    streaming: bool = Field(
        True,
        description="Of a Hugging Face data set: read as it comes instead of being downloaded and prepared "
        "first.",
    )
    columns: Mapping[Role, str] = Field(
        {},
        description="Where each of the roles source_image, edit_image, source_text, edit_text is; roles left "
        "out keep their default. Of a data set, a column; by default the role's name. Of shards, the "
        "member's extension: everything after the first dot of its name; several with ; between them, for "
        "the first that is there; and for a text, with : the field of a JSON member. By default "
        "source.png;source.jpg;source.jpeg;source.webp, the same with edit, json:source and json:edit. A "
        "folder has no columns.",
    )
    resolution: int = Field(
        512,
        description="Images are scaled and cropped to about resolution x resolution pixels, in the bucket "
        "nearest to their shape from 1:2 to 2:1. Not below step.",
    )
    step: int = Field(
        64, ge=8, multiple_of=8, description="Heights and widths are multiples of it; a multiple of 8."
    )
    limit: int = Field(
        0, ge=0, description="Number of samples to use, from the first, good or bad; 0 for all."
    )

    def __post_init__(self) -> None:
        if self.kind == "folder" and not isinstance(self.path, str):
            raise ValueError(f"path is {self.path!r} but must be one folder")
        if self.columns and self.kind == "folder":
            raise ValueError("columns are for webdataset and huggingface: a folder's names are fixed")
        if self.resolution < self.step:
            raise ValueError(
                f"resolution is {self.resolution} and step {self.step} but resolution must be at least step"
            )

    @property
    def name(self) -> str:
        """Name for messages."""
        path = self.path if isinstance(self.path, str) else self.path[0]
        return Path(path).name if self.kind == "folder" else path
