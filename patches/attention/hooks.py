"""What a hook in an attention layer receives, and how it ends the network's forward early.

A network's adapter (`UNet.install`, `DiT.install`) puts hooks into the host's slots for one call, around the
patches of other nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention

from .layers import AttentionLayer

# The host's name of a function in place of every attention, in `transformer_options`.
OVERRIDE = "optimized_attention_override"


class ForwardEnded(Exception):
    """Ends a network's forward. Raised in a hook and caught by the code that installed it."""


class Inputs(NamedTuple):
    """What a self-attention's projections read, each [rows, tokens, width].

    hidden: of q.
    context: of k.
    normed: `hidden` before other nodes' patches; the same object if there are none.
    """

    hidden: torch.Tensor
    context: torch.Tensor
    normed: torch.Tensor


class Joint(NamedTuple):
    """A joint attention of a text and an image, whose tokens follow the text's.

    q, k: [rows, heads, tokens, channels], projected, before any rotation.
    rotation: of all tokens, [rows or 1, 1, tokens, channels / 2, 2, 2], or None.
    text: tokens of the text.
    masked: whether a mask keeps tokens from each other.
    """

    q: torch.Tensor
    k: torch.Tensor
    rotation: torch.Tensor | None
    text: int
    masked: bool


# The rows of a call's batch.
Rows = slice | torch.Tensor


class Attention(NamedTuple):
    """An attention that is about to be computed.

    layer: its layer.
    kind: the host's name, `attn1` for self-attention, `attn2` for cross-attention. A joint attention is both.
    q, k, v: [rows, tokens, width] or [rows, tokens, heads, channels], projected, before any rotation; a row
        is an image of the call's batch. Of a joint attention only the tokens of the image.
    options: the call's `extra_options`.
    grid: rows and columns of the image in the network at this moment, None if the host does not say.
    inputs: of a UNet's self-attention; else None.
    rotation: of q and k by the tokens' positions (RoPE), [rows or 1, 1, tokens, channels / 2, 2, 2]; None if
        the network has none.
    joint: the whole of a joint attention; else None.
    """

    layer: AttentionLayer
    kind: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]
    grid: tuple[int, int] | None
    inputs: Inputs | None
    rotation: torch.Tensor | None = None
    joint: Joint | None = None

    def projected(self, name: str, rows: Rows) -> torch.Tensor:
        """`q`, `k` or `v` of these rows, [these rows, tokens, width]."""
        return getattr(self, name)[rows].flatten(2)

    def updated(self, name: str, rows: Rows) -> torch.Tensor:
        """What a low-rank update of `q`, `k` or `v` reads, [these rows, tokens, width].

        In a UNet the input of the projection. In a DiT, whose slots do not show that, its result.
        """
        return self.projected(name, rows) if self.inputs is None else self.inputs.hidden[rows]

    def rotated(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Queries or keys of these rows, [these rows, tokens, width], rotated by their positions."""
        if self.rotation is None:
            return x
        return rotate(x, self.rotation if len(self.rotation) == 1 else self.rotation[rows], self.layer.heads)


# Called before an attention is computed; what it returns is handed to `After`, unless it is None.
Before = Callable[[Attention], torch.Tensor | None]
# Called with a self-attention's layer, what `Before` returned, and the projected output, [rows, tokens,
# width]. Its return value replaces the output; other nodes' patches follow.
After = Callable[[AttentionLayer, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Attention) -> torch.Tensor:
    """Attention by the host's backend, or another node's override of it, [rows, tokens, width].

    at: an attention of the layer, for its heads and options.
    """
    return optimized_attention(
        q,
        k,
        v,
        at.layer.heads,
        attn_precision=at.options.get("attn_precision"),
        transformer_options=at.options,
    )


def rotate(x: torch.Tensor, rotation: torch.Tensor, heads: int) -> torch.Tensor:
    """RoPE of [rows, tokens, width], by the host's kernel.

    rotation: [rows or 1, 1, tokens or 1, channels / 2, 2, 2].
    """
    return apply_rope1(x.unflatten(-1, (heads, -1)), rotation.transpose(1, 2)).flatten(2)
