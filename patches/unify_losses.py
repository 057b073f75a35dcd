"""UnifyEdit's two losses on attention maps (arXiv 2504.05594), as this pack defines them.

The paper's own settings are not published in full; where they are open, the choice made here is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange, reduce

from ..models.sites import SiteKey


def structure_loss(
    source: Mapping[SiteKey, torch.Tensor], target: Mapping[SiteKey, torch.Tensor]
) -> torch.Tensor:
    """Self-attention preservation, L_SAP = sum (A_self - A*_self)^2.

    Summed over queries and keys, which weighs every resolution alike, and averaged over heads and sites.
    source, target: the same sites, each [rows, heads, tokens, tokens]. Returns [rows], at least 0.
    """
    losses = [
        reduce((target[key] - source[key]).square(), "b h i j -> b h", "sum").mean(dim=1) for key in target
    ]
    return torch.stack(losses).mean(dim=0)


def alignment_loss(
    target: Mapping[SiteKey, torch.Tensor],
    words: Sequence[Sequence[int]],
    text_tokens: int,
    masks: Mapping[SiteKey, torch.Tensor],
) -> torch.Tensor:
    """Cross-attention alignment in MAG-Edit's bounded form (arXiv 2312.11396): mean (1 - R)^2 over heads,
    sites and words.

    R is a word's share of the attention that the description's own tokens get (the start mark and the
    padding, which take most of it and say nothing about the edit, are left out), averaged over the mask's
    places with the mask as weight. The paper's unbounded -sum R^2 is not used.

    target: [rows, heads, places, tokens] at each site. words: each word's token positions, 1 to
    `text_tokens`. text_tokens: how many tokens the description has. masks: [rows or 1, places] at each site,
    0 to 1, not all zero; all ones for an edit of the whole image. Returns [rows], between 0 and 1.
    """
    losses = []
    for key, probabilities in target.items():
        shares = probabilities / probabilities[..., 1 : text_tokens + 1].sum(dim=-1, keepdim=True)
        mask = rearrange(masks[key], "b p -> b 1 p")
        for word in words:
            share = shares[..., list(word)].sum(dim=-1)
            ratio = (share * mask).sum(dim=-1) / mask.sum(dim=-1)
            losses.append((1 - ratio).square().mean(dim=1))
    return torch.stack(losses).mean(dim=0)
