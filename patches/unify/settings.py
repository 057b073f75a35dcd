"""Settings of the UnifyEdit sampler; checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..attention.masks import check_mask
from ..inversion import MODES, REFINE, Inversion
from .balance import Balance
from .losses import COMPARING, FORMS
from .tokens import EditTokens

REGIONS = ("outside", "inside", "everywhere")
TARGETS = ("latent", "noise")


@dataclass(frozen=True, kw_only=True)
class UnifyOptions:
    """Settings that few edits need.

    balance: how both gradients are weighted, or None for the default curves.
    alignment: form of the alignment loss, one of FORMS.
    structure_region: where structure is kept, one of REGIONS of the mask; everywhere if there is no mask or
    it covers the whole image.
    max_self_attn_res: structure is kept at the self-attention layers with at most this many tokens per side,
    or at the coarsest.
    cross_attn_res: words are aligned at the cross-attention layers with the grid closest to this many tokens
    per side; 0 for the layers measured for the kind of model, else 16.
    structure_layers, word_layers: names of layers, separated by commas, instead of the two above.
    update_target: `latent` moves the latent before each prediction; `noise` adds the gradient to the
    predicted noise.
    inner_steps: gradient steps before each prediction, 1 or more.
    start_percent, end_percent: the part of the sampling in which the latent is optimised, 0 to 1.
    auto_mask: find a mask in the cross-attention if none is given.
    inversion: mode of the inversion, one of MODES, for a run that inverts the image itself.
    virtual_seed: of the mode `virtual`.
    refine: of the mode `ddim`.
    checkpointing: compute the layers again in the backward pass: less memory, more time, same result.

    Raises ValueError for values out of range and for invalid combinations.
    """

    balance: Balance | None = None
    alignment: str = FORMS[0]
    structure_region: str = REGIONS[0]
    max_self_attn_res: int = 32
    cross_attn_res: int = 0
    structure_layers: str = ""
    word_layers: str = ""
    update_target: str = TARGETS[0]
    inner_steps: int = 1
    start_percent: float = 0.0
    end_percent: float = 1.0
    auto_mask: bool = False
    inversion: str = MODES[0]
    refine: int = REFINE
    virtual_seed: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("alignment", FORMS),
            ("structure_region", REGIONS),
            ("update_target", TARGETS),
            ("inversion", MODES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be one of {', '.join(choices)}")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps is {self.inner_steps} but must be at least 1")
        if self.update_target == "noise" and self.inner_steps > 1:
            raise ValueError(
                f"inner_steps is {self.inner_steps} but update_target noise leaves the latent where it is, "
                "so its gradient is the same every time: use 1, or update_target latent"
            )
        if not 0 <= self.start_percent < self.end_percent <= 1:
            raise ValueError(
                f"start_percent is {self.start_percent} and end_percent {self.end_percent}, but they must be "
                "from 0 to 1 and start_percent the smaller one"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class UnifySettings:
    """Settings of one edit.

    edit_tokens: one for all images, or one for each.
    mask: [rows or 1, height, width], 1 in the edit region, or None for the whole image. One of ones counts as
    None, so that with auto_mask a mask is found.

    Raises ValueError for a mask that does not fit the inverted image, and for invalid combinations.
    """

    inversion: Inversion
    edit_tokens: EditTokens | tuple[EditTokens, ...]
    balance: Balance = field(default_factory=Balance)
    mask: torch.Tensor | None = None
    options: UnifyOptions = field(default_factory=UnifyOptions)

    def __post_init__(self) -> None:
        if self.mask is not None and self.options.auto_mask and bool((self.mask >= 1).all()):
            object.__setattr__(self, "mask", None)
        if self.mask is not None:
            images, _, height, width = self.inversion.trajectory.shape[1:]
            rows = len(self.mask) if images == 1 else images  # one inverted image may be edited several times
            check_mask(self.mask, rows, height * self.inversion.scale, width * self.inversion.scale)
            self.check_cover(self.mask)
        elif self.compares and not self.options.auto_mask:
            raise ValueError(
                f"alignment {self.options.alignment} needs a mask: wire one, or turn auto_mask on"
            )

    @property
    def compares(self) -> bool:
        """Whether a loss compares inside and outside the mask."""
        return self.options.alignment in COMPARING and self.balance.beta2 > 0

    def check_cover(self, mask: torch.Tensor, name: str = "mask") -> None:
        """Raise ValueError if a mask covers nothing, or everything although an outside is needed."""
        where = "" if len(mask) == 1 else " of image {}"
        ends = torch.stack(mask.flatten(1).aminmax(dim=1), dim=1).tolist()
        for number, (least, most) in enumerate(ends, start=1):
            if most <= 0:
                raise ValueError(
                    f"{name}{where.format(number)} is empty (0 everywhere): paint where the edit happens, or "
                    "leave it unconnected"
                )
            if least >= 1 and self.compares:
                raise ValueError(
                    f"{name}{where.format(number)} covers the whole image, but alignment "
                    f"{self.options.alignment} needs an outside: leave a part of the image out, or use "
                    f"alignment {FORMS[0]}"
                )

    def tokens(self, count: int) -> tuple[EditTokens, ...]:
        """The tokens of `count` images, one if all have the same. Raises ValueError if they do not fit."""
        found = (self.edit_tokens,) if isinstance(self.edit_tokens, EditTokens) else tuple(self.edit_tokens)
        if len(found) not in (1, count):
            raise ValueError(
                f"edit_tokens are for {len(found)} images but {count} are edited: give one, or one for each"
            )
        return found
