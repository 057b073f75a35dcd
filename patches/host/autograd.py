"""Where gradients are possible inside the host, and the one helper that makes them so.

The executor runs every node under `torch.inference_mode`, and the weights its loaders make are inference
tensors, which autograd refuses to save. Deep copies of the model need `cached_patcher_init` and its memory
twice; exchanging the parameters changes a model that others share, and misses the weights that the host casts
or streams in elsewhere. Here nothing is exchanged: each inference tensor that reaches a torch function inside
`gradients` is handed over as a normal tensor over the same memory. No copy, no change to the model, and it
holds for parameters, conditions, ControlNets and other packs' tensors alike. The cost is about 2 microseconds
per torch call.

Where memory is short, and always with dynamic VRAM, the host streams weights: what a layer computes with is a
view of pages or of a buffer that the host unmaps or writes over as soon as the layer has run
(`comfy.ops.uncast_bias_weight`), while autograd still points at it. There a region hands copies to every
torch function that autograd records, in place of each tensor without a gradient. Whose memory a tensor lies
in cannot be told, so all are copied; what autograd does not save is freed as soon as the function is done.
Hooks on what autograd saves would copy less, but torch's checkpoint has hooks of its own, which win.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..attention.checks import TAKE_OUT


def _normal(value: Any) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        if not value.is_inference():
            return value
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if type(value) in (list, tuple):
        return type(value)(_normal(item) for item in value)
    return value


def _has_gradient(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad and not value.is_inference()
    return type(value) in (list, tuple) and any(map(_has_gradient, value))


def _own(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if _has_gradient(value) else value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_own(item) for item in value)
    return value


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument: add_, __iadd__, __setitem__, an attribute's __set__."""
    name = func.__name__.partition(".")[0]  # of torch.ops: add_.Tensor
    if name.endswith("__"):
        return name.startswith("__i") or name in ("__set__", "__setitem__")
    return name.endswith("_")


class _NormalTensors(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = _normal(args)
        kwargs = {name: _normal(value) for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _OwnTensors(_NormalTensors):
    """Where weights are streamed."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and _has_gradient([*args, *kwargs.values()]):
            written = 1 if _writes(func) else 0
            args = (*args[:written], *(_own(value) for value in args[written:]))
            kwargs = {name: value if name == "out" else _own(value) for name, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)


# Whether the innermost region is for streamed weights: what is computed again later needs one of its kind.
_STREAMED: ContextVar[bool] = ContextVar("descriptive_edit.streamed", default=False)


@contextmanager
def gradients(streamed: bool = False) -> Generator[None]:
    """A region in which autograd works although the host runs under inference mode with inference-tensor
    weights.

    Tensors that are to be differentiated must be made inside (`x.clone().requires_grad_()`). streamed:
    whether the host may take the weights back after each layer (`weights_streamed`); what autograd keeps is
    then copied.
    """
    mode = _OwnTensors() if streamed else _NormalTensors()
    before = _STREAMED.set(streamed)
    try:
        with torch.inference_mode(False), torch.enable_grad(), mode:
            yield
    finally:
        _STREAMED.reset(before)


def in_streamed_region() -> bool:
    """Whether the code runs inside `gradients` for streamed weights."""
    return _STREAMED.get()


def weights_streamed(patchers: Iterable[Any]) -> bool:
    """Whether weights of these ModelPatchers, or of the models attached to them, come and go with each layer:
    under dynamic VRAM, or because not all of them are on the device.
    """
    return any(
        model.is_dynamic() or model.loaded_size() < model.model_size()
        for patcher in patchers
        for model in (patcher, *patcher.get_nested_additional_models(), *patcher.model_patches_models())
    )


@contextmanager
def naming_writes() -> Generator[None]:
    """A region whose gradients fail with a ValueError that names `node` where another node has written in
    place into what autograd saved.
    """
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ValueError(
            f"a node writes in place into what the gradient needs, outside of the host's lists of "
            f"patches (in place of an attention, or of a layer). {TAKE_OUT}"
        ) from error


def differentiable_options(model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy of `model_options` for a model call that is differentiated; the original is not touched.

    Attention is computed by torch, because the host's other backends (sage, for one) have no derivative; an
    `optimized_attention_override` that was there before stays in charge and is given torch's to call.

    Two things are written in place after autograd has saved them, and are copied. Skip connections: the UNet
    adds ControlNet's residuals to them, and some nodes write into them. And what the functions that other
    nodes have put into the host's lists of patches save (FreeU writes into what it has just multiplied). The
    host's own layers save nothing else that these functions are given.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    previous = transformer.get("optimized_attention_override")

    def attention(func: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        if previous is None:
            return attention_pytorch(*args, **kwargs)
        return previous(attention_pytorch, *args, **kwargs)

    transformer["optimized_attention_override"] = attention
    patches = transformer.setdefault("patches", {})
    for slot, found in patches.items():
        patches[slot] = [_saving_copies(patch) if callable(patch) else patch for patch in found]
    patches.setdefault("input_block_patch_after_skip", []).append(_copy)
    return options


def _saving_copies(patch: Callable) -> Callable:
    """The same patch, within which autograd saves copies, so that it may write into what was saved."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy):
            return patch(*args, **kwargs)

    return run


def _copy(hidden: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
    return hidden.clone()
