"""How the host keeps weights: each mode is a context to load and run models in.

The fixture `memory_mode` of conftest.py runs what asks for it once in every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy_aimdo.control
import comfy_aimdo.model_mmap
import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from host import device


class _Mapping:
    """In place of the host's mapping of a weights file, whose library needs a card: memory that cannot be
    written to, as there.
    """

    def __init__(self, path: str) -> None:
        self._bytes = np.memmap(Path(path), np.uint8, "r")

    def get(self) -> int:
        """Its address."""
        return self._bytes.ctypes.data

    def get_file_handle(self) -> None:
        """No file that a card could read by itself."""


_ON_CPU = device().type == "cpu"
# Whether the host's dynamic patchers can be had: main.py's own steps, of which `prepare` of host.py has taken
# the first on a card.
_REAL = comfy_aimdo.control.init_devices(d.index for d in comfy.model_management.get_all_torch_devices())


@contextmanager
def _dynamic(enabled: bool, patcher: type) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", enabled)
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher)
        if not _REAL:
            patch.setattr(comfy_aimdo.model_mmap, "ModelMMAP", _Mapping)
        yield


def resident() -> AbstractContextManager[None]:
    """Layers have weights from the start, and keep them."""
    return _dynamic(False, ModelPatcher)


def lazy() -> AbstractContextManager[None]:
    """Dynamic VRAM, the default on NVIDIA, as main.py switches it on: the host's Linear has no weights, and
    its Embedding none with content, until a state dict is loaded, and files are mapped. On a CPU patchers
    stay ordinary ones by themselves.

    On a card whose dynamic patchers cannot be had, layers can be made here but models not run: they keep
    their file's dtype, and only a dynamic patcher casts it.
    """
    return _dynamic(True, ModelPatcherDynamic if _REAL or _ON_CPU else ModelPatcher)


class _Buffers:
    """The host's two cast buffers, which layers take in turn: a weight is a view of one of them, and its
    bytes are spoilt as soon as its layer has run.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device()) for _ in range(2)]
        self._turn = 0
        self._cast = comfy.ops.cast_bias_weight

    def cast_bias_weight(self, layer: Any, *args: Any, offloadable: bool = False, **kwargs: Any) -> tuple:
        """In place of the host's: what it gives, as views of a buffer."""
        self._turn = 1 - self._turn
        weights = self._cast(layer, *args, offloadable=offloadable, **kwargs)[:2]
        # Outside of every region: the host's own copies are not seen by torch functions either.
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            handed = self._fill(weights)
        return (*handed, self._turn) if offloadable else handed

    def _fill(self, weights: tuple) -> tuple:
        size = comfy.memory_management.vram_aligned_size(list(weights))
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, device=device())
        views = comfy.memory_management.interpret_gathered_like(list(weights), self._buffers[self._turn])
        for view, weight in zip(views, weights, strict=True):
            if weight is not None:
                view.data.copy_(weight.detach())
        # One that is trained is no weight of the host's.
        return tuple(
            weight if weight is not None and weight.requires_grad and not weight.is_inference() else view
            for view, weight in zip(views, weights, strict=True)
        )

    def uncast_bias_weight(self, layer: Any, weight: Any, bias: Any, turn: int | None) -> None:
        """In place of the host's. All bits set are no number in any dtype of weights."""
        if turn is not None:
            with torch._C.DisableTorchFunction(), torch.inference_mode(False):
                self._buffers[turn].data.fill_(255)


@contextmanager
def streamed() -> Generator[None]:
    """Memory is short, and no weight is on the device: each layer is given a view of a buffer for the time of
    its call.
    """
    buffers = _Buffers()
    with resident(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", buffers.cast_bias_weight)
        patch.setattr(comfy.ops, "uncast_bias_weight", buffers.uncast_bias_weight)
        patch.setattr(comfy.ops.CastWeightBiasOp, "comfy_cast_weights", True)
        patch.setattr(comfy.model_patcher.ModelPatcher, "loaded_size", lambda self: 0)
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "resident": resident,
    "lazy": lazy,
    "streamed": streamed,
}
# Those that models can run in.
MODES = {mode: context for mode, context in CONTEXTS.items() if mode != "lazy" or _REAL or _ON_CPU}


def only(*modes: str) -> pytest.MarkDecorator:
    """For a test that asks for `memory_mode`: these modes and no others."""
    return pytest.mark.parametrize("memory_mode", modes, indirect=True)
