"""What a hook in an attention layer receives, and how it ends the network's forward early.

A network's adapter (`UNet.install`) puts hooks into the host's slots for one call, around the patches of
other nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import optimized_attention

from .layers import AttentionLayer


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


class Attention(NamedTuple):
    """An attention that is about to be computed.

    layer: its layer.
    kind: the host's name, `attn1` for self-attention, `attn2` for cross-attention.
    q, k, v: [rows, tokens, width], projected; a row is an image of the call's batch.
    options: the call's `extra_options`.
    grid: rows and columns of the image in the network at this moment, None if the host does not say.
    inputs: of a self-attention; None for a cross-attention.
    """

    layer: AttentionLayer
    kind: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]
    grid: tuple[int, int] | None
    inputs: Inputs | None


# Called before an attention is computed; what it returns is handed to `After`, unless it is None.
Before = Callable[[Attention], torch.Tensor | None]
# Called with a self-attention's layer, what `Before` returned, and the projected output, [rows, tokens,
# width]. Its return value replaces the output; other nodes' patches follow.
After = Callable[[AttentionLayer, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Attention by the host's backend, or another node's override of it, [rows, tokens, width].

    options: the layer's `extra_options`.
    """
    return optimized_attention(
        q,
        k,
        v,
        options["n_heads"],
        attn_precision=options.get("attn_precision"),
        transformer_options=options,
    )
