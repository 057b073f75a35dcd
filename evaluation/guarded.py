"""`guarded.py COMMAND ...`: run a command that ends when standard input does.

Whoever holds the other end of that pipe may be killed outright and leaves nothing running. Standard library
only.
"""

from __future__ import annotations

import contextlib
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


def _end_with_input(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        sys.stdin.buffer.read()
    _end(process)


def main(command: list[str]) -> int:
    """Run the command and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            _end(process)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
