"""Time and memory on the host's device: measured by the GPU if there is one, otherwise by this process."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import psutil
import torch
from comfy.ldm.modules.attention import attention_pytorch


def device() -> torch.device:
    """The device that the host runs models on."""
    return comfy.model_management.get_torch_device()


def dtype() -> torch.dtype:
    """The dtype of measured models: float16 on a GPU, float32 otherwise."""
    return torch.float16 if device().type == "cuda" else torch.float32


def sides() -> tuple[int, ...]:
    """Sides of the measured latents; on a GPU also of 768x768 images."""
    return (32, 64, 96) if device().type == "cuda" else (32, 64)


def on_card() -> dict[str, str]:
    """The name of the GPU as `card`, for the results; it is printed. Nothing on a CPU."""
    if device().type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device())
    print(f"measured on {name}", flush=True)
    return {"card": name}


def now() -> float:
    """Seconds of a clock. On a GPU it is read after its queued work has finished. In one thread on a CPU it
    is the time that this process computed, which other programs hardly change.
    """
    if device().type == "cuda":
        torch.cuda.synchronize(device())
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def alternating(names: Iterable[str], rounds: int) -> Iterator[tuple[str, bool]]:
    """The names `rounds` times in alternating order, after a first round; whether it is counted."""
    order = list(names)
    for turn in range(rounds + 1):
        for name in order if turn % 2 else reversed(order):
            yield name, turn > 0


def median_ratio(times: Iterable[float], others: Iterable[float]) -> float:
    """The median of the ratios of each round, which a change of the machine's load between rounds spares."""
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


@contextmanager
def one_thread() -> Generator[None]:
    """Torch computes in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_memory(run: Callable[[], Any]) -> int:
    """The peak memory in bytes while `run` runs: torch's tensors on a GPU, otherwise the resident size of
    this process.
    """
    gc.collect()
    if device().type != "cuda":
        return _peak_resident(run)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device())
    run()
    return torch.cuda.max_memory_allocated(device())


def _peak_resident(run: Callable[[], Any]) -> int:
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak


def choose_attention(model: Any) -> None:
    """On a GPU attention stays the host's choice; on a CPU a ModelPatcher's becomes torch's.

    The host's choice for a CPU is far slower at attention than at everything else.
    """
    if device().type != "cuda":
        model.model_options["transformer_options"]["optimized_attention_override"] = torch_attention


def torch_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)
