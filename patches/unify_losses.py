"""UnifyEdit's two losses on attention maps (arXiv 2504.05594), as this pack defines them.

The paper's own settings are not published in full; where they are open, the choice made here is said.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import einsum, rearrange, reduce

from ..models.sites import SiteKey
from .unify_words import Words

FORMS = ("token_ratio", "spatial_ratio", "area_ratio")


def structure_loss(
    source: Mapping[SiteKey, torch.Tensor],
    target: Mapping[SiteKey, torch.Tensor],
    regions: Mapping[SiteKey, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Self-attention preservation: L_SAP = sum (A_self - A*_self)^2, or, in a region M,
    L_R-SAP = sum (M^ A_self - M^ A*_self)^2 with M^ = M M^T.

    Summed over queries and keys, which weighs every resolution alike, and averaged over heads and sites.
    source, target: the same sites, each [rows, heads, places, places]. regions: M at each site, [rows or 1,
    places], 0 to 1; None for everywhere. Returns [rows], at least 0.
    """
    losses = []
    for key, probabilities in target.items():
        change = probabilities - source[key]
        if regions is not None:
            region = regions[key]
            change = change * rearrange(region, "b i -> b 1 i 1") * rearrange(region, "b j -> b 1 1 j")
        losses.append(reduce(change.square(), "b h i j -> b h", "sum").mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def alignment_loss(
    target: Mapping[SiteKey, torch.Tensor],
    words: Words,
    masks: Mapping[SiteKey, torch.Tensor],
    form: str = FORMS[0],
) -> torch.Tensor:
    """Cross-attention alignment, averaged over heads, sites and words.

    With A a word's attention (the sum over its tokens) and M the mask as weight of each place:

    token_ratio    (1 - R)^2, R = mean over M of A / (attention that the description's own tokens get): the
                   token ratio of MAG-Edit (arXiv 2312.11396), with the start mark and the padding left out,
                   which take most of the attention and say nothing about the edit. 0 to 1. It needs no
                   outside: without a mask it is the loss for an edit of the whole image.
    spatial_ratio  3 - 4 R, R = sum over M of A / sum over all places of A: the spatial ratio of MAG-Edit.
                   -1 to 3.
    area_ratio     -R^2, R = mean over M of A / mean over 1 - M of A: UnifyEdit's ratio in the form that a
                   summary of the paper gives; without a lower bound.

    target: [rows, heads, places, tokens] at each site. masks: [rows or 1, places] at each site, 0 to 1, not
    all zero, and not all one where the form compares inside and outside. Returns [rows].
    """
    losses = []
    for key, probabilities in target.items():
        attention = einsum(probabilities, words.tokens, "b h p t, b w t -> b h w p")
        mask = rearrange(masks[key], "b p -> b 1 1 p")
        if form == "token_ratio":
            described = einsum(probabilities, words.description, "b h p t, b t -> b h p")
            share = attention / rearrange(described, "b h p -> b h 1 p")
            loss = (1 - _mean(share, mask)).square()
        elif form == "spatial_ratio":
            loss = 3 - 4 * (attention * mask).sum(dim=-1) / attention.sum(dim=-1)
        else:
            loss = -(_mean(attention, mask) / _mean(attention, 1 - mask)).square()
        losses.append(einsum(loss, words.weights, "b h w, b w -> b h").mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum(dim=-1) / weights.sum(dim=-1)
