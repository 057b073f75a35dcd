"""Gradient checkpointing in the host's networks: a layer keeps only its input and is computed again for its
gradient.

The host lets functions in its slots run a layer of a UNet or a block of a DiT. Ours run it through the host's
own function, inside torch's checkpoint. So the network is not changed and nothing has to be undone. A UNet's
layer is a ResBlock or a whole transformer.

Attention patches run again during the backward pass, in the same order and with the first call's
`transformer_options`. State they read must still exist then, and they must not raise inside a checkpointed
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepBlock, UNetModel, forward_timestep_embed
from torch.utils.checkpoint import checkpoint

from .autograd import Region, current_region, gradients
from .blocks import RunBlock, around_blocks

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


def _checkpoint(compute: Callable, *tensors: Any) -> Any:
    # Autograd may compute again in its own thread, and after the context has ended.
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    again = _Again(current_region())
    return checkpoint(compute, *tensors, context_fn=lambda: (nullcontext(), again), **how)


def checkpointed(options: dict[str, Any], module: Any) -> dict[str, Any]:
    """A copy of a call's `transformer_options` that checkpoints every layer or block of the network.

    module: the host's `diffusion_model`, a UNet or a DiT.

    Other packs' functions in the slots run inside ours. Without gradients nothing changes.
    """
    return _layers(options) if isinstance(module, UNetModel) else around_blocks(options, module, _run_block)


def _run_block(args: dict[str, Any], block: RunBlock) -> dict[str, Any]:
    """A DiT's block changes its input in place, so it gets copies, each time that it runs."""
    if not torch.is_grad_enabled():
        return block(args)
    # The host goes on with its own options, which say what block it is in.
    given = {**args, "transformer_options": dict(args["transformer_options"])}
    names = [name for name in ("img", "txt") if name in args]

    def compute(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = {name: tensor.clone() for name, tensor in zip(names, tensors, strict=True)}
        found = block({**given, **own})
        return tuple(found[name] for name in names)

    found = _checkpoint(compute, *(args[name] for name in names))
    return dict(zip(names, found, strict=True))


def _layers(options: dict[str, Any]) -> dict[str, Any]:
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

        x = _checkpoint(compute, x, emb, context) if torch.is_grad_enabled() else compute(x, emb, context)
        call.update(left)  # the host counts transformers in it
        return x

    patches[SLOT] = [(TimestepBlock, run), (SpatialTransformer, run)]
    # The host uses the first function that fits, so other layers keep theirs.
    patches[SLOT] += before
    return {**options, "patches": patches}
