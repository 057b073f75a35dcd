"""Reads weights of the host's layers as tensors of our own."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import LowVramPatch

Matrix = tuple[torch.Tensor, torch.Tensor | None]


def read_weights(layer: Any, dtype: torch.dtype, device: torch.device) -> Matrix:
    """A layer's weight and bias, as the host would compute with them.

    layer: one of the host's. Its weights may be stored elsewhere or in another dtype, changed by functions,
        or streamed. The host takes streamed ones back, so copies of them are returned. Weights that stay on
        the device are returned as they are: what is kept must be a copy of them.
    """
    weight, bias = layer.weight, layer.bias
    streamed = weight.device != device or "_v" in vars(layer)
    if not (streamed or layer.weight_function or layer.bias_function):
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    weight, bias, handle = comfy.ops.cast_bias_weight(
        layer, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
    )
    own = weight.clone(), None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(layer, weight, bias, handle)
    return own


def plain_linear(module: torch.nn.Module) -> Any:
    """The Linear whose weight and bias are all that `module` computes with, or None.

    module: a Linear, or one followed by Dropouts.

    None for layers of other kinds, such as quantised ones, and for those that a node has changed: with LoRAs
    in bypass mode, hooks on the module, or functions on its weights that may differ from call to call.
    """
    parts = [*module] if type(module) is torch.nn.Sequential else [module]
    linear, *rest = parts
    if not all(type(part) is torch.nn.Dropout and not (part.training and part.p) for part in rest):
        return None
    for part in (module, *parts):
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return None
    known = comfy.ops.disable_weight_init.Linear
    kind: Any = type(linear)
    if not isinstance(linear, known) or type(linear.weight) is not torch.nn.Parameter:
        return None
    own_forward = (
        kind.forward is known.forward and kind.forward_comfy_cast_weights is known.forward_comfy_cast_weights
    )
    functions = [*linear.weight_function, *linear.bias_function]
    return linear if own_forward and all(isinstance(each, LowVramPatch) for each in functions) else None
