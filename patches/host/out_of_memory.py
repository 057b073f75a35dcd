"""Turns an out-of-memory error into one that says what to do and holds no tensors."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import comfy.model_management

_HostsOwn: Any = comfy.model_management.OOM_EXCEPTION  # torch's, or Exception where torch has none


class OutOfMemory(_HostsOwn):
    """Derived from the error after which the host unloads its models before the next prompt."""


class memory_advice:
    """A context whose out-of-memory errors say what to do and no longer hold the tensors of the failed calls.

    Raises OutOfMemory, once: from inside another such context it passes unchanged.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An error refers to the frames it came through, and so to every tensor there, graphs included. This
        # frame would, too.
        del traceback
        if error is None or isinstance(error, OutOfMemory) or not comfy.model_management.is_oom(error):
            return
        reason, inner = str(error).partition("\n")[0], error
        while inner is not None:
            inner.__traceback__ = None
            inner = inner.__context__
        raise OutOfMemory(f"no memory left: {self._advice} ({reason})") from None
