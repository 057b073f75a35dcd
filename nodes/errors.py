"""The one place that puts a node's title in front of an error.

The rooms below `nodes/` raise plain errors: the input, what was found, what to do. Every node's `execute` is
wrapped by `named`. What a node leaves in a MODEL, GUIDER or SAMPLER runs inside another node, and gets
`naming` as its `door`.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from comfy_api.latest import io

from ..patches.host.out_of_memory import OutOfMemory

_PACK = __name__.removesuffix("nodes.errors")


class _Named:
    """An error that already has a title."""


class _NodeError(_Named, ValueError):
    pass


class _NodeOutOfMemory(_Named, OutOfMemory):
    pass


class naming:
    """A context whose errors of this pack begin with `node`'s title, unless an inner context has named them.

    Reusable. Raises ValueError, or OutOfMemory if memory ran out. Errors of other packs and of the host pass
    unchanged.
    """

    def __init__(self, node: type[io.ComfyNode]) -> None:
        self._node = node

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, _Named) or not isinstance(error, (ValueError, OutOfMemory)):
            return
        assert traceback is not None
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        if not traceback.tb_frame.f_globals.get("__name__", "").startswith(_PACK):
            return
        named = _NodeOutOfMemory if isinstance(error, OutOfMemory) else _NodeError
        raise named(f"{self._node.define_schema().display_name}: {error}") from None


def named(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """`node`, with errors that begin with its title."""
    execute = node.__dict__["execute"].__func__

    @functools.wraps(execute)
    def within(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> io.NodeOutput:
        with naming(cls):
            return execute(cls, *args, **inputs)

    changed: Any = node  # a type checker takes methods as they are in the class
    changed.execute = classmethod(within)
    return node
