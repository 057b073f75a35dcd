"""Gradient checkpointing in the host's UNet: a layer keeps its input and is computed again when its gradient
is wanted.

The host asks the functions in `forward_timestep_embed_patch` to run a layer in its place. Ours runs the same
layer, through the host's own function and inside torch's checkpoint, so the network itself is never touched
and nothing has to be undone. A layer is a ResBlock or a whole transformer: patches of the attention run again
with it, in their order and with the `transformer_options` of the first time. What they read from elsewhere
must still be there then, and one that ends the call with an exception must not be inside of a layer whose
gradient is wanted.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepBlock, forward_timestep_embed
from torch.utils.checkpoint import checkpoint

from .autograd import gradients, in_streamed_region

SLOT = "forward_timestep_embed_patch"


class _Again:
    """`gradients` anew for each time a layer is computed again: one forward may have several backwards."""

    def __init__(self, streamed: bool) -> None:
        self._streamed = streamed

    def __enter__(self) -> None:
        self._region = gradients(self._streamed)
        self._region.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._region.__exit__(*error)


def checkpointed(options: dict[str, Any]) -> dict[str, Any]:
    """A call's `transformer_options` with which every layer of the UNet is checkpointed; the original is not
    touched. Other packs' functions in the slot run inside ours. Without gradients nothing changes.
    """
    patches = dict(options.get("patches", {}))
    before = list(patches.get(SLOT, ()))

    def run(
        layer: torch.nn.Module,
        x: torch.Tensor,
        emb: torch.Tensor,
        context: Any,
        call: dict[str, Any],
        *rest: Any,
    ) -> torch.Tensor:
        first = {**call, "patches": {**call["patches"], SLOT: before}}
        left: dict[str, Any] = {}

        def compute(x: torch.Tensor, emb: torch.Tensor, context: Any) -> torch.Tensor:
            own = dict(first)
            x = forward_timestep_embed((layer,), x, emb, context, own, *rest)
            left.update(own, patches=call["patches"])
            return x

        if torch.is_grad_enabled():
            # Autograd may compute again in a thread of its own, and after the region has been left.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            again = _Again(in_streamed_region())
            x = checkpoint(compute, x, emb, context, context_fn=lambda: (nullcontext(), again), **how)
        else:
            x = compute(x, emb, context)
        call.update(left)  # the host counts transformers in it
        return x

    patches[SLOT] = [(TimestepBlock, run), (SpatialTransformer, run)]
    # The host takes the first that fits: other layers keep the functions they had.
    patches[SLOT] += before
    return {**options, "patches": patches}
