"""UnifyEdit's two losses on attention maps (arXiv 2504.05594), as defined by this pack.

The paper does not publish all of its settings; the docstrings say what was chosen here.

Both are sums over layers. Values and derivatives with respect to queries and keys are computed for one layer
and one piece of its map at a time, so only one piece's probabilities are ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import einsum, rearrange, reduce

from ..attention.recorder import LossGradient, Piece, Projections
from .words import Words

FORMS = ("token_ratio", "absolute", "spatial_ratio", "area_ratio")
COMPARING = ("spatial_ratio", "area_ratio")  # inside of the mask with outside


# From one layer's and one piece's probabilities to their part of a loss, [rows].
_Part = Callable[[str, Piece, torch.Tensor], torch.Tensor]


def structure_loss(
    source: Mapping[str, Projections],
    target: Mapping[str, Projections],
    regions: Mapping[str, torch.Tensor] | None = None,
) -> LossGradient:
    """Self-attention preservation: L_SAP = sum (A_self - A*_self)^2.

    In a region M: L_R-SAP = sum (M^ A_self - M^ A*_self)^2 with M^ = M M^T. Summed over queries and keys, so
    that every resolution has the same weight; averaged over heads and layers. Values are at least 0.

    source, target: the same layers, each with as many queries as keys.
    regions: M at each layer, [rows or 1, tokens], 0 to 1; None for everywhere.
    """

    def part(key: str, piece: Piece, probabilities: torch.Tensor) -> torch.Tensor:
        change = probabilities - source[key].probabilities(piece)
        if regions is not None:
            region = regions[key]
            change = change * rearrange(region[:, piece.queries], "b i -> b 1 i 1")
            change = change * rearrange(region, "b j -> b 1 1 j")
        return reduce(change.square(), "b h i j -> b", "sum") / (target[key].heads * len(target))

    return _derive(target, part)


def alignment_loss(
    target: Mapping[str, Projections],
    words: Words,
    masks: Mapping[str, torch.Tensor],
    form: str = FORMS[0],
) -> LossGradient:
    """Cross-attention alignment, averaged over heads, layers and words.

    With A a word's attention (the sum over its tokens) and M the mask as a weight of each image token:

    - token_ratio: (1 - R)^2, R = mean over M of A / (attention that the description's own tokens get).
      0 to 1. The token ratio of MAG-Edit (arXiv 2312.11396), without the start mark and the padding, which
      get most of the attention and are not part of the edit. Without a mask it is the loss for an edit of the
      whole image.
    - absolute: (1 - R)^2, R = mean over M of A. 0 to 1. What MAG-Edit's code computes: it divides by the
      attention of all tokens, which is 1.
    - spatial_ratio: 3 - 4 R, R = sum over M of A / sum over all tokens of A. -1 to 3. The spatial ratio of
      MAG-Edit.
    - area_ratio: -R^2, R = mean over M of A / mean over 1 - M of A. No lower bound. UnifyEdit's ratio in the
      form that a summary of the paper gives.

    target: queries are the image's tokens, keys the text's.
    masks: [rows or 1, tokens] at each layer, 0 to 1, not all zero, and not all one if the form compares
    inside and outside.
    """

    def part(key: str, piece: Piece, probabilities: torch.Tensor) -> torch.Tensor:
        attention = einsum(probabilities, words.tokens, "b h p t, b w t -> b h w p")
        mask = rearrange(masks[key], "b p -> b 1 1 p")
        if form == "token_ratio":
            described = einsum(probabilities, words.description, "b h p t, b t -> b h p")
            share = attention / rearrange(described, "b h p -> b h 1 p")
            loss = (1 - _mean(share, mask)).square()
        elif form == "absolute":
            loss = (1 - _mean(attention, mask)).square()
        elif form == "spatial_ratio":
            loss = 3 - 4 * (attention * mask).sum(dim=-1) / attention.sum(dim=-1)
        else:
            loss = -(_mean(attention, mask) / _mean(attention, 1 - mask)).square()
        return einsum(loss, words.weights, "b h w, b w -> b") / (target[key].heads * len(target))

    return _derive(target, part, whole_heads=True)


def _derive(target: Mapping[str, Projections], part: _Part, whole_heads: bool = False) -> LossGradient:
    """The sum of all parts, and its derivatives with respect to the queries and keys that have a gradient."""
    values, parts = [], []
    for key, layer in target.items():
        ends = [tensor for tensor in (layer.q, layer.k) if tensor.requires_grad]
        q, k = (tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in (layer.q, layer.k))
        leaves = [leaf for leaf in (q, k) if leaf.requires_grad]
        slopes: Sequence[torch.Tensor] = ()
        for piece in layer.pieces(whole_heads):
            value = part(key, piece, Projections(q, k, layer.heads).probabilities(piece))
            values.append(value.detach())
            if leaves:
                more = torch.autograd.grad(value.sum(), leaves)
                slopes = [one + other for one, other in zip(slopes, more, strict=True)] if slopes else more
        parts += zip(ends, slopes, strict=True)
    return LossGradient(torch.stack(values).sum(dim=0), parts)


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum(dim=-1) / weights.sum(dim=-1)
