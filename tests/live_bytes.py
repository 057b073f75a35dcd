"""How many bytes of tensors are alive at once: a count that is the same on every machine and at every run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside the region make. peak: the most that was alive at once.

    Python's collector is off inside, so that what only it would free is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __enter__(self) -> Any:
        gc.collect()
        gc.disable()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    leaves = tree_leaves(values)
    tensors = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tensors + [leaf for leaf in leaves if isinstance(leaf, torch.UntypedStorage)]
