"""How the host keeps weights, as it can be had on a CPU: each mode is a context to load and run models in.

The fixture `memory_mode` of conftest.py runs what asks for it once in every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import comfy.memory_management
import comfy.model_patcher
import pytest


@contextmanager
def _dynamic(enabled: bool, patcher: type) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", enabled)
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher)
        yield


def resident() -> AbstractContextManager[None]:
    """Layers have weights from the start, and keep them."""
    return _dynamic(False, comfy.model_patcher.ModelPatcher)


def lazy() -> AbstractContextManager[None]:
    """Dynamic VRAM, the default on NVIDIA, as main.py switches it on: the host's Linear has no weights, and
    its Embedding none with content, until a state dict is loaded. On a CPU patchers stay ordinary ones.
    """
    return _dynamic(True, comfy.model_patcher.ModelPatcherDynamic)


MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {"resident": resident, "lazy": lazy}
