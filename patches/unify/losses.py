"""UnifyEdit's two losses on attention maps (arXiv 2504.05594), as defined by this pack.

The paper does not publish all of its settings; the docstrings say what was chosen here.

Both are sums over layers. Values and derivatives with respect to queries and keys are computed for one piece
of a layer's map at a time, or for several layers whose maps fit into a piece, so only one piece's
probabilities are ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from einops import einsum, rearrange, reduce

from ..attention.projections import PIECE, Piece, Projections, stack
from ..attention.recorder import LossGradient
from .words import Words

FORMS = ("token_ratio", "absolute", "spatial_ratio", "area_ratio")
COMPARING = ("spatial_ratio", "area_ratio")  # inside of the mask with outside
# The least value of the alignment loss in each form. Structure's is 0.
LEAST = {"token_ratio": 0.0, "absolute": 0.0, "spatial_ratio": -1.0, "area_ratio": -math.inf}


# From one piece's probabilities, [layers, rows, heads, queries, keys], to their part of a loss, [rows].
_Part = Callable[[Piece, torch.Tensor], torch.Tensor]


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

    def parts(keys: Sequence[str]) -> _Part:
        before, heads = stack([source[key] for key in keys]), target[keys[0]].heads

        def part(piece: Piece, probabilities: torch.Tensor) -> torch.Tensor:
            change = probabilities - before.probabilities(piece)
            if regions is not None:
                region = regions[keys[0]]
                change = change * rearrange(region[:, piece.queries], "b i -> b 1 i 1")
                change = change * rearrange(region, "b j -> b 1 1 j")
            return reduce(change.square(), "l b h i j -> b", "sum") / (heads * len(target))

        return part

    return _derive(target, parts, regions)


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

    def parts(keys: Sequence[str]) -> _Part:
        mask, heads = rearrange(masks[keys[0]], "b p -> b 1 1 p"), target[keys[0]].heads

        def part(piece: Piece, probabilities: torch.Tensor) -> torch.Tensor:
            attention = einsum(probabilities, words.tokens, "l b h p t, b w t -> l b h w p")
            if form == "token_ratio":
                described = einsum(probabilities, words.description, "l b h p t, b t -> l b h p")
                share = attention / rearrange(described, "l b h p -> l b h 1 p")
                loss = (1 - _mean(share, mask)).square()
            elif form == "absolute":
                loss = (1 - _mean(attention, mask)).square()
            elif form == "spatial_ratio":
                loss = 3 - 4 * (attention * mask).sum(dim=-1) / attention.sum(dim=-1)
            else:
                loss = -(_mean(attention, mask) / _mean(attention, 1 - mask)).square()
            return einsum(loss, words.weights, "l b h w, b w -> b") / (heads * len(target))

        return part

    return _derive(target, parts, masks, whole_heads=True)


def _derive(
    target: Mapping[str, Projections],
    parts: Callable[[Sequence[str]], _Part],
    weights: Mapping[str, torch.Tensor] | None,
    whole_heads: bool = False,
) -> LossGradient:
    """The sum of all parts, and its derivatives with respect to the queries and keys that have a gradient.

    weights: of the image's tokens at each layer; layers with the same ones are computed together.
    """
    values, found = [], []
    for keys in _alike(target, weights):
        layers, part = [target[key] for key in keys], parts(keys)
        together = stack(layers)
        tensors = [
            tensor.detach().float().requires_grad_(tensor.requires_grad)
            for tensor in (together.q, together.k)
        ]
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        together, slopes = replace(together, q=tensors[0], k=tensors[1]), []
        for piece in together.pieces(whole_heads):
            value = part(piece, together.probabilities(piece))
            values.append(value.detach())
            if leaves:
                more = torch.autograd.grad(value.sum(), leaves)
                slopes = [one + other for one, other in zip(slopes, more, strict=True)] if slopes else more
        ends = zip(
            *([end for end in (layer.q, layer.k) if end.requires_grad] for layer in layers), strict=True
        )
        for own, slope in zip(ends, slopes, strict=True):
            found += zip(own, slope.unbind(), strict=True)
    return LossGradient(torch.stack(values).sum(dim=0), found)


def _alike(target: Mapping[str, Projections], weights: Mapping[str, torch.Tensor] | None) -> list[list[str]]:
    """Layers of the same shapes and weights, as many at a time as a piece of their maps holds."""
    groups: dict[tuple, list[str]] = {}
    for key, layer in target.items():
        q, k = layer.q, layer.k
        alike = q.shape, k.shape, layer.heads, layer.part, q.requires_grad, k.requires_grad
        groups.setdefault((*alike, weights and id(weights[key])), []).append(key)
    found = []
    for (q, k, heads, *_), keys in groups.items():
        most = max(1, PIECE // (q[0] * heads * q[1] * k[1]))
        found += [keys[first : first + most] for first in range(0, len(keys), most)]
    return found


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum(dim=-1) / weights.sum(dim=-1)
