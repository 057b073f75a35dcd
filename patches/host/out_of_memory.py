"""What a run that finds no memory left says and lets go of."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import comfy.model_management

_HostsOwn: Any = comfy.model_management.OOM_EXCEPTION  # torch's, or Exception where torch has none


class OutOfMemory(_HostsOwn):
    """Of the kind by which the host knows that it must unload its models before the next prompt."""


class memory_advice:
    """Says what to do where memory runs out inside, and lets go of what the calls there hold.

    Raises OutOfMemory, once: from inside another region it passes as it is.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An error holds the frames it came through, and with them every tensor there, graphs included; and
        # so would this frame, which the new error comes through.
        del traceback
        if error is None or isinstance(error, OutOfMemory) or not comfy.model_management.is_oom(error):
            return
        reason, inner = str(error).partition("\n")[0], error
        while inner is not None:
            inner.__traceback__ = None
            inner = inner.__context__
        raise OutOfMemory(f"no memory left: {self._advice} ({reason})") from None
