"""Enables autograd inside ComfyUI's inference-mode executor.

The executor runs every node under `torch.inference_mode`, and its loaders create weights as inference
tensors, which autograd refuses to save. A deep copy of the model needs `cached_patcher_init` and twice the
memory. Replacing the parameters changes a model that others share, and misses the weights that the host casts
or streams in elsewhere. So nothing is replaced: inside `gradients` each inference tensor that reaches a torch
function is passed on as a normal tensor over the same memory. This needs no copy and no change to the model,
and works for parameters, conditions, ControlNets and other packs' tensors alike. It costs about a
microsecond per torch call.

If memory is short, and always with dynamic VRAM, the host streams weights. A layer then computes with a view
of pages or of a buffer that the host unmaps or overwrites as soon as the layer has run
(`comfy.ops.uncast_bias_weight`), while autograd still refers to it. In that case every torch function that
autograd records gets copies of the tensors without a gradient. A tensor does not tell whose memory it is, so
all are copied; what autograd does not save is freed when the function returns. Hooks on saved tensors would
copy less, but torch's checkpoint has its own hooks, which take precedence.

The host's kernels for RoPE have no derivative; inside `gradients` the plain formula takes their place.
And its DiT blocks add in place to what their norms have saved, so these get copies: as much memory as adding
out of place would take.

On a card torch's attention and some convolutions add up a derivative in any order, so that two runs with the
same seed would differ. Inside `gradients` they use a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import comfy.model_patcher
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..attention.checks import TAKE_OUT

_KINDS = (torch.Tensor, torch.nn.Parameter)
_SEEN = (*_KINDS, list, tuple)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """A normal tensor over the same memory."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class Aliases:
    """Normal tensors over the memory of a model's weights, made once and used in several regions.

    An alias is used while its weight lies where it lay. It keeps that memory alive, so those that are not
    needed any more must be dropped: call `drop_unused` after each region.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._used: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """The alias of an inference tensor."""
        found = self._used.get(id(weight)) or self._kept.get(id(weight))
        if found is None or found[1].data_ptr() != weight.data_ptr() or found[1].shape != weight.shape:
            found = weight, _alias(weight)  # with the weight, so that no other one has its id
        self._used[id(weight)] = found
        return found[1]

    def drop_unused(self) -> None:
        """Drop all that were not used since the last call."""
        self._kept, self._used = self._used, {}


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


def _layer_norm(x: torch.Tensor, *args: Any, weight: torch.Tensor | None = None, **rest: Any) -> torch.Tensor:
    """Norms without weights are those of DiTs, which are modulated instead (adaLN)."""
    return F.layer_norm(x.clone() if weight is None and x.requires_grad else x, *args, weight=weight, **rest)


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """RoPE (arXiv 2104.09864): each pair of channels of [..., tokens, channels] times a matrix of
    [..., tokens, channels / 2, 2, 2].
    """
    pairs = x.to(rotation.dtype).unflatten(-1, (-1, 2))
    turned = rotation[..., 0] * pairs[..., :1] + rotation[..., 1] * pairs[..., 1:]
    return turned.flatten(-2).type_as(x)


def _rotate_both(
    q: torch.Tensor, k: torch.Tensor, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(q, rotation), _rotate(k, rotation)


def _repeatable_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Torch's attention. Its kernels look at torch's setting while they compute the derivative, and only then
    may it be on: other functions refuse to run with it.
    """
    out = F.scaled_dot_product_attention(*args, **kwargs)
    node = out.grad_fn
    while node is not None and "Slice" in node.name():  # of padded heads
        node = node.next_functions[0][0]
    if node is not None and "Attention" in node.name():  # else it is made of other functions
        before = torch.get_deterministic_debug_mode()
        node.register_prehook(lambda *_: torch.set_deterministic_debug_mode("error"))
        node.register_hook(lambda *_: torch.set_deterministic_debug_mode(before))
    return out


_KERNELS = {"apply_rope": _rotate_both, "apply_rope1": _rotate}
# What takes the place of a function in a region.
_DERIVABLE: dict[Any, Callable] = {
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _repeatable_attention,
}
for _name, _formula in _KERNELS.items():
    if hasattr(torch.ops.comfy_kitchen, _name):  # the host runs without this library too
        _DERIVABLE[getattr(torch.ops.comfy_kitchen, _name)] = _formula


class _NormalTensors(TorchFunctionMode):
    def __init__(self, aliases: Aliases | None = None) -> None:
        super().__init__()
        self._aliases = aliases

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ == "__get__":  # of an attribute, such as shape
            return func(*args)
        func = _DERIVABLE.get(func, func)
        args = tuple([self._normal(value) if type(value) in _SEEN else value for value in args])
        if not kwargs:
            return func(*args)
        return func(*args, **{name: self._normal(value) for name, value in kwargs.items()})

    def _normal(self, value: Any) -> Any:
        kind = type(value)
        if kind in _KINDS:
            if not value.is_inference():
                return value
            return _alias(value) if kind is torch.Tensor or self._aliases is None else self._aliases.of(value)
        if kind in (list, tuple):
            return kind(self._normal(item) for item in value)
        return value


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


class Region(NamedTuple):
    """How autograd works in a `gradients` region.

    streamed: whether the host may take the weights back after each layer (`weights_streamed`). What autograd
    keeps is then copied, and aliases are not used.
    aliases: of weights, if regions share them.
    """

    streamed: bool = False
    aliases: Aliases | None = None


# The innermost region: a recomputation later needs the same kind of region.
_REGION: ContextVar[Region] = ContextVar("descriptive_edit.region", default=Region())  # noqa: B039


@contextmanager
def gradients(streamed: bool = False, aliases: Aliases | None = None) -> Generator[None]:
    """A context in which autograd works although the host runs in inference mode.

    A tensor to differentiate with respect to must be created inside (`x.clone().requires_grad_()`).

    streamed, aliases: as in a Region.
    """
    mode = _OwnTensors() if streamed else _NormalTensors(aliases)
    before = _REGION.set(Region(streamed, aliases))
    order, convolutions = torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with torch.inference_mode(False), torch.enable_grad(), mode:
            yield
    finally:
        torch.backends.cudnn.deterministic = convolutions
        torch.set_deterministic_debug_mode(order)  # where an error stopped a backward pass
        _REGION.reset(before)


def current_region() -> Region:
    """The innermost region that the code runs in."""
    return _REGION.get()


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
