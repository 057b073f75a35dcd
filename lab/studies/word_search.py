"""The search for UnifyEdit's alignment loss (CAA): its form, layers and weight, and what is no setting of it.

That is: only some heads of a layer, smoothed maps, and other lengths of a step. The pack has no code for
these; they are put in its place here for the length of an edit. The loss takes means of a map over the mask.
So smoothing the mask instead is the same: a Gaussian is symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from einops import rearrange
from kornia.filters import gaussian_blur2d

from ...models.tiny_studio import scenes
from ...patches.attention.recorder import LossGradient, Projections
from ...patches.unify import target as branch
from ...patches.unify.balance import Balance
from ...patches.unify.losses import COMPARING, FORMS, alignment_loss
from ...patches.unify.settings import UnifyOptions
from ...patches.unify.text_guidance import TextGuidance
from .methods import Edit, unify_by_type
from .studio import Batch, Studio, StudioMethod
from .study import Rows

# The half of the default layers' heads that tells objects apart best, by `words_by_layer`.
HEADS = {"output.3.0": (1,), "output.4.0": (1, 2, 3)}
POINTS = 101  # of a drawn curve


@dataclass(frozen=True)
class Tried(Edit):
    """Settings that only the search needs.

    alignment, cross_attn_res, inner_steps: as in UnifyOptions. An edit of the whole image has `absolute` for
    a form that compares inside and outside.
    heads: by layer, those whose attention is read; all of a layer that is not named.
    smoothing: standard deviation of the Gaussian in tokens; 0 for none.
    """

    denoise: float = 1.0
    cfg: float = 2.0
    masked: bool = True
    structure_region: str = "outside"
    alignment: str = FORMS[0]
    cross_attn_res: int = UnifyOptions.cross_attn_res
    inner_steps: int = 1
    heads: tuple[tuple[str, tuple[int, ...]], ...] = ()
    smoothing: float = 0.0

    def options(self) -> UnifyOptions:
        whole = not self.masked and self.alignment in COMPARING
        return replace(
            super().options(),
            alignment="absolute" if whole else self.alignment,
            cross_attn_res=self.cross_attn_res,
            inner_steps=self.inner_steps,
        )

    def loss(
        self, target: Mapping[str, Projections], words: Any, masks: Mapping[str, torch.Tensor], form: str
    ) -> LossGradient:
        """`alignment_loss` of the chosen heads, with smoothed masks."""
        heads = dict(self.heads)
        chosen = {key: only(found, heads[key]) if key in heads else found for key, found in target.items()}
        if self.smoothing:
            masks = {key: smoothed(mask, self.smoothing) for key, mask in masks.items()}
        return alignment_loss(chosen, words, masks, form)


def only(found: Projections, heads: tuple[int, ...]) -> Projections:
    """Some heads of an attention."""
    q, k = (
        rearrange(
            rearrange(part, "b n (h d) -> b n h d", h=found.heads)[:, :, list(heads)], "b n h d -> b n (h d)"
        )
        for part in (found.q, found.k)
    )
    return Projections(q, k, len(heads))


def smoothed(mask: torch.Tensor, deviation: float) -> torch.Tensor:
    """A mask of a square grid, [rows, tokens], after a Gaussian of this standard deviation in tokens."""
    side, size = math.isqrt(mask.shape[1]), 2 * math.ceil(3 * deviation) + 1
    grid = rearrange(mask, "b (h w) -> b 1 h w", h=side)
    blurred = gaussian_blur2d(grid, (size, size), (deviation, deviation), border_type="constant")
    return rearrange(blurred, "b 1 h w -> b (h w)")


def unbounded(gradients: branch.Gradients, name: str) -> torch.Tensor:
    """Instead of `Gradients.excess`: steps have no longest length."""
    return torch.full_like(gradients.values[0], torch.inf)


def source_step(
    guidance: TextGuidance, sigma: torch.Tensor, below: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Instead of `TextGuidance.length`: words in units of the source's own step, as structure is."""
    return step


UNBOUNDED = (branch.Gradients, "excess", unbounded)
SOURCE_STEP = (TextGuidance, "length", source_step)


def tried(edit: Tried, *changes: tuple[Any, str, Any]) -> StudioMethod:
    """UnifyEdit with these settings for all edit types. changes: of classes, their attributes and values."""
    edits = dict.fromkeys((*scenes.EDIT_TYPES, scenes.TWO), edit)

    def make(tiny: Studio, batch: Batch) -> torch.Tensor:
        with ExitStack() as stack:
            for place, name, value in ((branch, "alignment_loss", edit.loss), *changes):
                stack.enter_context(mock.patch.object(place, name, value))
            return unify_by_type(tiny, batch, edits)

    return StudioMethod("UnifyEdit", make, " ".join(["unify", str(edit), *(v.__name__ for *_, v in changes)]))


def early(balance: Balance, end: float) -> Balance:
    """The same curves, but alignment's is 0 from the progress `end` on."""
    along = [point / (POINTS - 1) for point in range(POINTS)]
    structure, alignment = zip(
        *(replace(balance, beta1=1.0, beta2=1.0).weights(p) for p in along), strict=True
    )
    return replace(
        balance, drawn=(structure, tuple(w * (p < end) for w, p in zip(alignment, along, strict=True)))
    )


def search() -> Rows:
    """The defaults of UnifyEdit over all noise levels, and one change of them in each other row."""
    base = Tried()

    def weighted(beta2: float, **values: Any) -> Tried:
        return replace(base, balance=Balance(beta2=beta2), **values)

    found = {
        "both": base,
        "SAP only": weighted(0.0),
        "smoothed by 0.5 tokens": replace(base, smoothing=0.5),
        "smoothed by 1 token": replace(base, smoothing=1.0),
        "the better half of the heads": replace(base, heads=tuple(HEADS.items())),
        "CAA in the first half of the steps": replace(base, balance=early(base.balance, 0.5)),
        "2 inner steps": replace(base, inner_steps=2),
        "3 inner steps": replace(base, inner_steps=3),
        "absolute": replace(base, alignment="absolute"),
        "spatial_ratio": replace(base, alignment="spatial_ratio"),
        "words at 16x16": replace(base, cross_attn_res=16),
        "β2 0.1": weighted(0.1),
        "β2 1": weighted(1.0),
        "absolute, β2 1": weighted(1.0, alignment="absolute"),
        "spatial_ratio, β2 1": weighted(1.0, alignment="spatial_ratio"),
        "CAA only": replace(base, balance=Balance(beta1=0.0)),
        "neither loss": replace(base, balance=Balance(beta1=0.0, beta2=0.0)),
    }
    return {label: tried(edit) for label, edit in found.items()} | {
        "SAP only, steps of any length": tried(weighted(0.0), UNBOUNDED),
        "words in units of the source's step": tried(base, SOURCE_STEP),
        "both of these": tried(base, UNBOUNDED, SOURCE_STEP),
    }
