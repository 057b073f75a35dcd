"""An edit mask from where the edit's words look (the idea of Prompt-to-Prompt's LocalBlend)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import einsum, rearrange
from kornia.geometry.transform import resize

from ..attention.layers import AttentionLayer
from ..attention.recorder import Projections
from .words import Words

THRESHOLD = 0.3  # LocalBlend's


def word_attention(
    attention: Mapping[str, Projections],
    words: Words,
    layers: Sequence[AttentionLayer],
    height: int,
    width: int,
) -> torch.Tensor:
    """Where the words look: their share of the attention that their description gets, averaged over heads,
    words and layers.

    attention: at each of `layers`, queries are places and keys the tokens of the text. height, width: the
    latent's. Returns [rows, height, width], 0 to 1; 0 for a row without words.
    """
    found = []
    for layer in layers:
        probabilities = attention[layer.key].mean()
        described = einsum(probabilities, words.description, "b p t, b t -> b p")
        # A sum over words that are weighted: what a row is padded with has no weight.
        looks = einsum(probabilities, words.tokens, words.weights, "b p t, b w t, b w -> b p")
        rows, columns = layer.grid(height, width)
        share = rearrange(looks / described, "b (h w) -> b 1 h w", h=rows, w=columns)
        found.append(resize(share, (height, width), interpolation="bilinear", align_corners=False))
    return rearrange(torch.stack(found).mean(dim=0), "b 1 h w -> b h w")


def attention_mask(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 where attention is high: each map brought to 0..1 image by image, their average brought to 0..1
    again, and cut at THRESHOLD.

    attention: maps of [rows, height, width], as many as there are readings. Returns [rows, height, width] of
    0 and 1, with at least one 1 in each row.
    """
    return (_stretched(sum(map(_stretched, attention))) >= THRESHOLD).float()


def _stretched(values: torch.Tensor) -> torch.Tensor:
    least, most = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    return torch.where(most > least, (values - least) / (most - least), torch.ones_like(values))
