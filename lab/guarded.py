"""`guarded.py COMMAND ...`: run a command that ends when standard input does.

If the process at the other end of that pipe is killed, nothing is left running. On Linux the command also
dies with this process, since Ray kills a worker's children. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 15


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    """prctl(PR_SET_PDEATHSIG, SIGKILL), for the process that becomes the command."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _end_with_input(process: subprocess.Popen[bytes]) -> None:
    # Not through sys.stdin: its lock, held by this thread, would make the interpreter abort at its end.
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    _end(process)


def main(command: list[str]) -> int:
    """Run the command and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    first = _die_with_parent if sys.platform == "linux" else None
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=first)
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            _end(process)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
