"""The benchmark as a Ray Data job: one ComfyUI for each worker, on one machine or a cluster.

Ray places the workers, hands out the batches, and restarts a worker that died and repeats its batch. Workers
make and measure the edits; only the driver writes `results.jsonl`, each edit once. This pack, ComfyUI, the
benchmark and the run's folder have the same paths on every machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .comfy_worker import ATTEMPTS, own_workers
from .layouts import read_cases
from .methods import read_methods
from .results import Results
from .run_local import Task
from .scorer import Scorer

INSIDE = Path(__file__).resolve().parents[2] / "training" / "inside.py"


class Edits:
    """A worker: its ComfyUI and scorer. Raises WorkerGone if the ComfyUI does not start."""

    def __init__(self, comfyui: str, options: argparse.Namespace) -> None:
        self._methods = {method.label: method for method in read_methods(options.method)}
        self._cases = {case.id: case for case in read_cases(options.layout, options.data, options.split)}
        (self._comfy,) = own_workers(Path(comfyui), 1, list(self._methods.values()))
        self._comfy.connect()
        self._scorer, self._out = Scorer(options.clip_vision, options.clip), options.out

    def result(self, label: str, case_id: str) -> str:
        """The result of an edit as JSON; one that failed was tried ATTEMPTS times."""
        method, case = self._methods[label], self._cases[case_id]
        for _ in range(ATTEMPTS):
            outcome = self._comfy.edit(method, case)
            if not outcome.error:
                break
        return json.dumps(self._scorer.result(self._out, method, case, outcome))

    def close(self) -> None:
        self._comfy.close(retire=True)


def _worker(comfyui: str, options: argparse.Namespace) -> type:
    """A class that Ray can send to a process that cannot import this package yet."""
    inside, module = str(INSIDE), __name__

    class Worker:
        def __init__(self) -> None:
            runpy.run_path(inside)["enter"](comfyui)
            self._edits = importlib.import_module(module).Edits(comfyui, options)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            pairs = zip(batch["method"], batch["case"], strict=True)
            return {"result": [self._edits.result(str(method), str(case)) for method, case in pairs]}

        def __del__(self) -> None:
            # Ray deletes this when the job ends; the guard ends the ComfyUI of a worker that is killed.
            if hasattr(self, "_edits"):
                self._edits.close()

    return Worker


def run(tasks: Sequence[Task], options: argparse.Namespace, results: Results) -> None:
    """Do the tasks on Ray and write their results.

    options: of `dev.py benchmark`, with absolute paths.

    Left undone are the batches of workers whose ComfyUI died and did not restart, and everything that is left
    if no ComfyUI starts.
    Raises ImportError if Ray is not installed, and ValueError if there is no cluster at the address.
    """
    try:
        ray: Any = importlib.import_module("ray")
        data: Any = importlib.import_module("ray.data")
    except ImportError:
        raise ImportError("--ray needs Ray: pip install -r lab/requirements.txt") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # A worker mostly waits for its ComfyUI: one machine may have more of them than cores.
    own: dict[str, Any] = {"num_cpus": options.workers + 1, "include_dashboard": False}
    try:
        ray.init(options.ray or "local", logging_level="warning", **({} if options.ray else own))
    except ConnectionError as error:
        raise ValueError(f"--ray {options.ray}: {error}") from None
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1
    rows = [{"method": method.label, "case": case.id} for method, case in tasks]
    edits = data.from_items(rows, override_num_blocks=-(-len(rows) // options.batch)).map_batches(
        _worker(str(Path(os.environ["COMFYUI_PATH"]).resolve()), options),
        batch_size=options.batch,
        compute=data.ActorPoolStrategy(size=options.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=float(torch.cuda.is_available()) if options.gpus is None else options.gpus,
    )
    with tqdm(total=len(rows), unit="edit", desc="benchmark") as bar:
        try:
            for row in edits.iter_rows():
                results.append(json.loads(row["result"]), bar.write)
                bar.update()
        except ray.exceptions.RayError as error:
            # Ray itself prints the worker's whole traceback.
            bar.write(f"given up: {str(error).strip().splitlines()[-1]}")
        finally:
            ray.shutdown()
