"""What importing the pack adds to the host's start.

The host is started with the pack and without it, in turns, and ends when all nodes are loaded. Seconds are
the processor's, which other programs on the machine hardly change.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..server import PACK_FOLDER, device_arguments, server_command, temporary_base
from .measuring import alternating

AIMS = {"start_seconds_added": 0.3}
SHOWN = 8


def start(base: Path, options: Sequence[str] = ()) -> tuple[float, str]:
    """Processor seconds of one start, and what it wrote on stderr. Raises CalledProcessError if it fails.

    options: of Python.
    """
    command = server_command(Path(os.environ["COMFYUI_PATH"]), base, 0, ["--quick-test-for-ci"])
    command[1:1] = options
    before = os.times()
    done = subprocess.run(
        [*command, "--disable-api-nodes", *device_arguments()],
        cwd=base,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    after = os.times()
    spent = [getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system")]
    return sum(spent), done.stderr


def slowest(report: str) -> list[tuple[float, str]]:
    """The slowest modules of the pack by what each took itself, and what else it had to import.

    report: of `python -X importtime`, in which a module follows what it imports.
    """
    found = []
    for line in report.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        whole, _, name = rest.partition("|")
        if PACK_FOLDER in name and own.strip().isdigit():
            found.append((int(whole) / 1e6, name.rpartition(PACK_FOLDER)[2].lstrip(".")))
    return sorted(found, reverse=True)[:SHOWN]


def measure(rounds: int) -> dict[str, float]:
    """Starts the host `rounds` times with the pack and as often without."""
    bases = {"with": temporary_base(), "without": temporary_base()}
    (bases["without"] / "custom_nodes" / PACK_FOLDER).unlink()
    seconds: dict[str, list[float]] = {name: [] for name in bases}
    try:
        for name, counted in alternating(bases, rounds):
            spent, _ = start(bases[name])
            seconds[name] += [spent] if counted else []
        _, report = start(bases["with"], ("-X", "importtime"))
    finally:
        for base in bases.values():
            shutil.rmtree(base)
    for name, spent in seconds.items():
        print(f"start {name} the pack: {statistics.median(spent):.2f} s", flush=True)
    for spent, module in slowest(report):
        print(f"  {spent:.3f} s  {module or 'the pack'}")
    added = statistics.median(a - b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    return {"start_seconds_added": added}
