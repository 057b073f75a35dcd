"""The benchmark as a Ray Data job: one ComfyUI a worker, on one machine or a cluster.

Ray places the workers, hands out the batches, and restarts a worker that died and repeats its batch. Workers
make pictures and figures; the driver alone writes `results.jsonl`, each edit once. This pack, ComfyUI, the
benchmark and the run's folder lie at the same paths on every machine.
"""

from __future__ import annotations

import importlib
import json
import logging
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .adapters import read_cases
from .engine import ATTEMPTS, own_engines
from .meter import Meter
from .methods import read_methods
from .results import Results
from .runner import Task

LAUNCHER = Path(__file__).resolve().parent.parent.parent / "dev.py"


@dataclass(frozen=True)
class Job:
    """What every worker reads for itself. benchmark: layout, folder and split."""

    benchmark: tuple[str, Path | None, str]
    methods: tuple[Path, ...]
    out: Path
    comfyui: Path
    clip_vision: Path | None
    clip: Path | None


@dataclass(frozen=True)
class Resources:
    """address: of a Ray cluster; empty for one on this machine that ends with the job. workers: how many
    ComfyUIs. gpus: of each, also parts of one. batch: edits that a worker is given at a time, and that are
    lost and done again if it dies.
    """

    address: str
    workers: int
    gpus: float
    batch: int


class TaskRunner:
    """A worker's ComfyUI and what measures its edits. Raises EngineGone if the ComfyUI does not start."""

    def __init__(self, job: Job) -> None:
        self._methods = {method.label: method for method in read_methods(job.methods)}
        self._cases = {case.id: case for case in read_cases(*job.benchmark)}
        (self._engine,) = own_engines(job.comfyui, 1, list(self._methods.values()))
        self._engine.connect()
        self._meter = Meter(job.clip_vision, job.clip)
        self._out = job.out

    def line(self, label: str, case_id: str) -> str:
        """An edit's result as JSON; one that failed was tried ATTEMPTS times."""
        method, case = self._methods[label], self._cases[case_id]
        for _ in range(ATTEMPTS):
            outcome = self._engine.attempt(method, case)
            if not outcome.error:
                break
        return json.dumps(self._meter.line(self._out, method, case, outcome))

    def close(self) -> None:
        self._engine.close(retire=True)


def _worker(job: Mapping[str, Any]) -> type:
    """A class that Ray can send to a process that does not know this package yet."""
    launcher, module = str(LAUNCHER), __name__

    class Worker:
        def __init__(self) -> None:
            runpy.run_path(launcher)["enter"](job["comfyui"])
            here = importlib.import_module(module)
            self._runner = here.TaskRunner(here.Job(**job))

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            pairs = zip(batch["method"], batch["case"], strict=True)
            return {"line": [self._runner.line(str(method), str(case)) for method, case in pairs]}

        def __del__(self) -> None:
            # Ray lets go of this when the job ends; a worker that is killed has its ComfyUI's guard.
            if hasattr(self, "_runner"):
                self._runner.close()

    return Worker


def run(tasks: Sequence[Task], job: Job, resources: Resources, results: Results) -> None:
    """Do the tasks on Ray and write their results.

    Left undone are the batches of workers whose ComfyUI died and did not start again, and the rest if it did
    not start at first. Raises ImportError, with the command that installs it, if Ray is missing, and
    ValueError if there is no cluster at the address.
    """
    try:
        ray = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    except ImportError:
        raise ImportError("--ray needs Ray: pip install 'ray[data]>=2.60'") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # A worker waits for its ComfyUI most of the time: on one machine there may be more of them than cores.
    local = {} if resources.address else {"num_cpus": resources.workers + 1, "include_dashboard": False}
    try:
        ray.init(resources.address or "local", logging_level="warning", **local)
    except ConnectionError as error:
        raise ValueError(f"--ray {resources.address}: {error}") from None
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1
    rows = [{"method": method.label, "case": case.id} for method, case in tasks]
    edits = data.from_items(rows, override_num_blocks=-(-len(rows) // resources.batch)).map_batches(
        _worker(vars(job)),
        batch_size=resources.batch,
        compute=data.ActorPoolStrategy(size=resources.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=resources.gpus,
    )
    with tqdm(total=len(rows), unit="edit", desc="benchmark") as bar:
        try:
            for row in edits.iter_rows():
                line = json.loads(row["line"])
                if "error" in line:
                    bar.write(f"{line['method']}, {line['case']}: {line['error']}")
                results.append(line)
                bar.update()
        except ray.exceptions.RayError as error:
            # Ray itself prints the worker's whole traceback.
            bar.write(f"given up: {str(error).strip().splitlines()[-1]}")
        finally:
            ray.shutdown()
