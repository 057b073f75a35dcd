"""How long the templates that need no download take from Run to picture, and how much memory.

Each runs as it ships, once, on a server that has just started: loading of models and first use are part of
it, the server's start is not. Processor seconds are of all of the server's threads. Threads that wait for
others count too, so on a busy machine they are more; OMP_NUM_THREADS=1 avoids that.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from ..server import ROOT, Prompt, Server, device_arguments
from .measuring import alternating

AIMS = {"template_01_seconds": 20.0}
FOLDER = ROOT / "workflows" / "api"
FILES = (".safetensors", ".png")


class Spent(NamedTuple):
    """What one run took: seconds, processor seconds, and the server's peak of resident memory in MiB."""

    seconds: float
    processor: float
    memory: float


def without_download() -> dict[str, Prompt]:
    """The templates that name no file, by name."""
    prompts = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.iterdir())}
    return {name: prompt for name, prompt in prompts.items() if not names_file(prompt)}


def names_file(prompt: Prompt) -> bool:
    """Whether an input of the graph is the name of a model or a picture."""
    values = (value for node in prompt.values() for value in node["inputs"].values())
    return any(isinstance(value, str) and value.endswith(FILES) for value in values)


def run(server: Server, prompt: Prompt) -> Spent:
    """Run a graph on a server and count."""
    processes = psutil.Process(server.process_id).children(recursive=True)
    done, peak = threading.Event(), 0

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, sum(process.memory_info().rss for process in processes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, before = time.perf_counter(), spent()
    try:
        server.run(prompt)
        return Spent(time.perf_counter() - start, spent() - before, peak / 2**20)
    finally:
        done.set()
        watcher.join()


def measure(rounds: int) -> dict[str, float]:
    """Runs each template `rounds` times, each time on a new server; the medians."""
    prompts = without_download()
    found: dict[str, list[Spent]] = {name: [] for name in prompts}
    print(f"{'template':<32}{'seconds':>10}{'processor':>12}{'MiB':>8}{'load':>8}")
    for name, _ in alternating(prompts, rounds - 1):
        with Server(Path(os.environ["COMFYUI_PATH"]), device_arguments()) as server:
            spent = run(server, prompts[name])
        found[name].append(spent)
        load = psutil.getloadavg()[0]
        print(f"{name:<32}{spent[0]:>10.1f}{spent[1]:>12.1f}{spent[2]:>8.0f}{load:>8.1f}", flush=True)
    keys = ("seconds", "processor_seconds", "peak_mib")
    return {
        f"template_{name[:2]}_{key}": statistics.median(values)
        for name, spent in found.items()
        for key, values in zip(keys, zip(*spent, strict=True), strict=True)
    }
