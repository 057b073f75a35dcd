"""Where gradients are possible inside the host, and the one helper that makes them so.

The executor runs every node under `torch.inference_mode`, and the weights its loaders make are inference
tensors, which autograd refuses to save. Deep copies of the model need `cached_patcher_init` and its memory
twice; exchanging the parameters changes a model that others share, and misses the weights that the host casts
or streams in elsewhere. Here nothing is exchanged: each inference tensor that reaches a torch function inside
`gradients` is handed over as a normal tensor over the same memory. No copy, no change to the model, and it
holds for parameters, conditions, ControlNets and other packs' tensors alike. The cost is about 2 microseconds
per torch call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch.overrides import TorchFunctionMode


def _normal(value: Any) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        if not value.is_inference():
            return value
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if type(value) in (list, tuple):
        return type(value)(_normal(item) for item in value)
    return value


class _NormalTensors(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = _normal(args)
        kwargs = {name: _normal(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def gradients() -> Iterator[None]:
    """A region in which autograd works although the host runs under inference mode with inference-tensor
    weights.

    Tensors that are to be differentiated must be made inside (`x.clone().requires_grad_()`).
    """
    with torch.inference_mode(False), torch.enable_grad(), _NormalTensors():
        yield


def differentiable_options(model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy of `model_options` for a model call that is differentiated; the original is not touched.

    Attention is computed by torch, because the host's other backends (sage, for one) have no derivative; an
    `optimized_attention_override` that was there before stays in charge and is given torch's to call. Skip
    connections are copied, because the UNet adds ControlNet's residuals to them in place after autograd has
    saved them.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    previous = transformer.get("optimized_attention_override")

    def attention(func: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        if previous is None:
            return attention_pytorch(*args, **kwargs)
        return previous(attention_pytorch, *args, **kwargs)

    transformer["optimized_attention_override"] = attention
    transformer.setdefault("patches", {}).setdefault("input_block_patch_after_skip", []).append(_copy)
    return options


def _copy(hidden: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
    return hidden.clone()
