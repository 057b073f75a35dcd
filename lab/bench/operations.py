"""Counts the operations that torch dispatches, which do not depend on the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("computed", "casts", "views", "memory", "waits")
CASTS = {"to", "_to_copy", "copy_", "clone"}
WAITS = {"item", "_local_scalar_dense"}
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}


class Operations(TorchDispatchMode):
    """Counts operations while it is entered, those of backward passes among them.

    kinds: how many of each of KINDS. casts: changes of dtype or device, and copies. views: results that share
    their argument's memory. memory: memory that is taken or assigned, but not written. waits: a tensor's
    number, for which a GPU would be waited. computed: all others.
    names: how often each computed operation was called, such as `linear`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.names: Counter[str] = Counter()

    @property
    def computed(self) -> int:
        return self.kinds["computed"]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        kind = _kind(func, name, args, result)
        self.kinds[kind] += 1
        if kind == "computed":
            self.names[name] += 1
        return result


def _kind(func: Any, name: str, args: tuple[Any, ...], result: Any) -> str:
    if name in MEMORY:
        return "memory"
    if name in WAITS:
        return "waits"
    if name == "copy_":
        return "casts"
    if func._schema.is_mutable or not (args and isinstance(args[0], torch.Tensor)):
        return "computed"
    # `to`, `reshape` and `dropout` copy or compute only where they must.
    first = result if isinstance(result, torch.Tensor) else next(iter(result))
    if first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
        return "views"
    return "casts" if func.is_view or name in CASTS else "computed"


def print_operations(counts: dict[str, Operations], rows: int = 12) -> None:
    """A table of the kinds, and of the `rows` names that differ most from the first count's."""
    first = next(iter(counts.values()))
    last = [*counts.values()][-1]
    names = sorted(last.names | first.names, key=lambda name: first.names[name] - last.names[name])
    print(f"{'operations a step':<36}" + "".join(f"{name:>14}" for name in counts))
    for kind in KINDS:
        print(f"{kind:<36}" + "".join(f"{found.kinds[kind]:>14}" for found in counts.values()))
    for name in names[:rows]:
        print(f"  {name:<34}" + "".join(f"{found.names[name]:>14}" for found in counts.values()))
