"""What UnifyEdit's sampler follows, and what of it can be refused before a model is at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..inversion import Inversion
from .balance import Balance
from .losses import FORMS
from .tokens import EditTokens

METHODS = ("latent", "noise")
REGIONS = ("everywhere", "inside", "outside")


@dataclass(frozen=True, eq=False)
class UnifySettings:
    """tokens: one for all images, or one for each. mask: [rows or 1, height, width], 1 where the edit
    happens, or None for the whole image. auto_mask: without a mask, find one in the cross-attention.

    structure_side: structure is kept at the self-attentions with at most this many tokens a side, or at the
    coarsest.
    word_side: words are aligned at the cross-attentions whose grid is closest to this many tokens a side.
    structure_sites, word_sites: names of sites, separated by commas, in place of the two.

    alignment: one of FORMS. keep: where structure is kept, one of REGIONS of the mask. method: `latent`
    moves the latent before each prediction; `noise` adds the gradient to the predicted noise instead.
    inner_iterations: gradient steps before each prediction. start, end: share of the sampling, 0 to 1, in
    which the latent is optimised. mask_update: move it inside the mask only. checkpoint: compute the UNet's
    layers again in the backward pass instead of keeping them, which takes less memory and more time.

    Raises ValueError for what cannot go together and for values out of range.
    """

    inversion: Inversion
    tokens: EditTokens | tuple[EditTokens, ...]
    balance: Balance
    mask: torch.Tensor | None = None
    structure_side: int = 32
    word_side: int = 16
    structure_sites: str = ""
    word_sites: str = ""
    alignment: str = FORMS[0]
    keep: str = REGIONS[0]
    method: str = METHODS[0]
    inner_iterations: int = 1
    start: float = 0.0
    end: float = 1.0
    mask_update: bool = False
    auto_mask: bool = False
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("alignment", FORMS), ("keep", REGIONS), ("method", METHODS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be one of {', '.join(choices)}")
        if self.inner_iterations < 1:
            raise ValueError(f"inner_iterations is {self.inner_iterations} but must be at least 1")
        if self.method == "noise" and self.inner_iterations > 1:
            raise ValueError(
                f"inner_iterations is {self.inner_iterations} but the method noise leaves the latent "
                "where it is, so its gradient is the same every time: use 1, or the method latent"
            )
        if not (math.isfinite(self.start) and math.isfinite(self.end) and 0 <= self.start < self.end <= 1):
            raise ValueError(
                f"start_percent is {self.start} and end_percent {self.end}, but they must be from 0 to 1 and "
                "start_percent the smaller one"
            )
        if self.mask is None and not self.auto_mask:
            for name, used in self.needs_mask().items():
                if used:
                    raise ValueError(f"{name} needs a mask: wire one, or turn auto_mask on")
        if self.mask is not None:
            self.check_cover(self.mask)

    def needs_mask(self) -> dict[str, bool]:
        """What only makes sense with a mask, and whether it is asked for."""
        return {
            f"alignment {self.alignment}": self.alignment != FORMS[0],
            f"keep {self.keep}": self.keep != REGIONS[0],
            "mask_update": self.mask_update,
        }

    def check_cover(self, mask: torch.Tensor, name: str = "mask") -> None:
        """Raise ValueError if a mask covers nothing, or everything where an outside is needed."""
        where = "" if len(mask) == 1 else " of image {}"
        values = mask.flatten(1)
        ends = torch.stack(values.aminmax(dim=1), dim=1).tolist()
        for number, (least, most) in enumerate(ends, start=1):
            if most <= 0:
                raise ValueError(
                    f"{name}{where.format(number)} is empty (0 everywhere): paint where the edit happens, or "
                    "leave it unconnected"
                )
            compares = self.alignment != FORMS[0] and self.balance.beta2 > 0
            if least >= 1 and (compares or (self.keep == "outside" and self.balance.beta1 > 0)):
                wants = f"alignment {self.alignment}" if compares else "keep outside"
                raise ValueError(
                    f"{name}{where.format(number)} covers the whole image, but {wants} needs an outside: "
                    f"leave a part of the image out, or use alignment {FORMS[0]} and keep {REGIONS[0]}"
                )

    def rows(self, count: int) -> tuple[EditTokens, ...]:
        """The tokens of `count` images, one if all have the same. Raises ValueError if they do not fit."""
        tokens = (self.tokens,) if isinstance(self.tokens, EditTokens) else tuple(self.tokens)
        if len(tokens) not in (1, count):
            raise ValueError(
                f"edit_tokens are for {len(tokens)} images but {count} are edited: give one, or one for each"
            )
        return tokens
