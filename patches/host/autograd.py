"""Enables autograd inside ComfyUI's inference-mode executor.

The executor runs every node under `torch.inference_mode`, and its loaders create weights as inference
tensors, which autograd refuses to save. A deep copy of the model needs `cached_patcher_init` and twice the
memory. Replacing the parameters changes a model that others share, and misses the weights that the host casts
or streams in elsewhere. So nothing is replaced: inside `gradients` each inference tensor that reaches a torch
function is passed on as a normal tensor over the same memory. This needs no copy and no change to the model,
and works for parameters, conditions, ControlNets and other packs' tensors alike. It costs about 2
microseconds per torch call.

If memory is short, and always with dynamic VRAM, the host streams weights. A layer then computes with a view
of pages or of a buffer that the host unmaps or overwrites as soon as the layer has run
(`comfy.ops.uncast_bias_weight`), while autograd still refers to it. In that case every torch function that
autograd records gets copies of the tensors without a gradient. A tensor does not tell whose memory it is, so
all are copied; what autograd does not save is freed when the function returns. Hooks on saved tensors would
copy less, but torch's checkpoint has its own hooks, which take precedence.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
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
    """For streamed weights."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and _has_gradient([*args, *kwargs.values()]):
            written = 1 if _writes(func) else 0
            args = (*args[:written], *(_own(value) for value in args[written:]))
            kwargs = {name: value if name == "out" else _own(value) for name, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)


# Whether the innermost region is for streamed weights: a recomputation later needs the same kind of region.
_STREAMED: ContextVar[bool] = ContextVar("descriptive_edit.streamed", default=False)


@contextmanager
def gradients(streamed: bool = False) -> Generator[None]:
    """A context in which autograd works although the host runs in inference mode.

    A tensor to differentiate with respect to must be created inside (`x.clone().requires_grad_()`).

    streamed: whether the host may take the weights back after each layer (`weights_streamed`); what autograd
    keeps is then copied.
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


def weights_streamed(patchers: Iterable[ModelPatcher]) -> bool:
    """Whether the host streams weights of these models or of the models attached to them.

    It does under dynamic VRAM, or if not all of them are on the device.
    """
    return any(
        model.is_dynamic() or model.loaded_size() < model.model_size()
        for patcher in patchers
        for model in (patcher, *patcher.get_nested_additional_models(), *patcher.model_patches_models())
    )


@contextmanager
def naming_writes() -> Generator[None]:
    """A context that turns autograd's error about a tensor changed in place into a ValueError with
    instructions.
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
    """A copy of `model_options` for a model call that is differentiated; the original is unchanged.

    Attention is computed by torch, because other backends of the host (such as sage) have no derivative. An
    existing `optimized_attention_override` is still called, with torch's attention.

    Two kinds of tensor are changed in place after autograd has saved them, and are copied. Skip connections:
    the UNet adds ControlNet's residuals to them, and some nodes write into them. And what other nodes'
    functions in the host's lists of patches save (FreeU writes into what it has just multiplied). The host's
    own layers save nothing else that these functions receive.
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
    """The same patch, but autograd saves copies inside it, so that it may change the originals."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy):
            return patch(*args, **kwargs)

    return run


def _copy(hidden: torch.Tensor, transformer_options: dict[str, Any]) -> torch.Tensor:
    return hidden.clone()
