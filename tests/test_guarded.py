"""A guarded command: it lives as long as the pipe that holds it."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
from host import server

HOLDER = """
import subprocess, sys, time
guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(guard.pid, guard.stdout.readline().decode(), flush=True)
time.sleep(600)
"""
COMMAND = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def test_ends_with_a_killed_holder() -> None:
    """Protects: whoever started a ComfyUI may be killed outright, and no process is left."""
    words = [sys.executable, "-c", HOLDER, sys.executable, str(server.GUARD), sys.executable, "-c", COMMAND]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        left = [psutil.Process(int(pid)) for pid in holder.stdout.readline().split()]
        assert len(left) == 2
        assert all(process.is_running() for process in left)
        holder.kill()
    assert not psutil.wait_procs(left, timeout=20)[1]


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_ends_with_the_guard(how: str) -> None:
    """Protects: a guard that is stopped or killed takes its command along, while the pipe is still held."""
    words = [sys.executable, str(server.GUARD), sys.executable, "-c", COMMAND]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guard:
        assert guard.stdout is not None
        command = psutil.Process(int(guard.stdout.readline()))
        getattr(guard, how)()
        assert not psutil.wait_procs([command], timeout=20)[1]


def test_exit_code() -> None:
    """Protects: how the command ended is known to who started it."""
    words = [sys.executable, str(server.GUARD), sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as guard:
        assert guard.wait(20) == 7
