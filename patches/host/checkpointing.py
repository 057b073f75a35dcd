"""Gradient checkpointing in the host's UNet: a layer keeps only its input and is computed again for its
gradient.

The host lets the functions in `forward_timestep_embed_patch` run a layer. Ours runs the same layer through
the host's own function, inside torch's checkpoint. So the network is not changed and nothing has to be
undone. A layer is a ResBlock or a whole transformer.

Attention patches run again during the backward pass, in the same order and with the first call's
`transformer_options`. State they read must still exist then, and they must not raise inside a checkpointed
layer.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepBlock, forward_timestep_embed
from torch.utils.checkpoint import checkpoint

from .autograd import Region, current_region, gradients

SLOT = "forward_timestep_embed_patch"


class _Again:
    """Enters a new `gradients` region at each recomputation: one forward may have several backwards."""

    def __init__(self, kind: Region) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        self._region = gradients(*self._kind)
        self._region.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._region.__exit__(*error)


def checkpointed(options: dict[str, Any]) -> dict[str, Any]:
    """A copy of a call's `transformer_options` that checkpoints every layer of the UNet.

    Other packs' functions in the slot run inside ours. Without gradients nothing changes.
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
            # Autograd may compute again in its own thread, and after the context has ended.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            again = _Again(current_region())
            x = checkpoint(compute, x, emb, context, context_fn=lambda: (nullcontext(), again), **how)
        else:
            x = compute(x, emb, context)
        call.update(left)  # the host counts transformers in it
        return x

    patches[SLOT] = [(TimestepBlock, run), (SpatialTransformer, run)]
    # The host uses the first function that fits, so other layers keep theirs.
    patches[SLOT] += before
    return {**options, "patches": patches}
