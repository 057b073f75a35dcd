"""Edits on several ComfyUIs at once; each is measured and written when it is done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from tqdm import tqdm

from .cases import Case
from .comfy_worker import ComfyWorker, Outcome, WorkerGone
from .methods import Workflow
from .results import Results
from .scorer import Scorer

Task = tuple[Workflow, Case]


def run(tasks: Sequence[Task], workers: Sequence[ComfyWorker], scorer: Scorer, results: Results) -> None:
    """Do the tasks. Some are left undone only if all workers have failed.

    Each worker has a thread; this thread measures. All workers are stopped at the end.
    """
    waiting: queue.Queue[Task | None] = queue.Queue()
    outcomes: queue.Queue[tuple[Task, Outcome] | WorkerGone] = queue.Queue()
    for task in tasks:
        waiting.put(task)
    for worker in workers:
        threading.Thread(target=_work, args=(worker, waiting, outcomes), daemon=True).start()
    left, working = len(tasks), len(workers)
    try:
        with tqdm(total=left, unit="edit", desc="benchmark") as bar:
            while left and working:
                event = outcomes.get()
                if isinstance(event, WorkerGone):
                    working -= 1
                    bar.write(f"given up: {event}")
                    continue
                (method, case), outcome = event
                results.append(scorer.result(results.folder, method, case, outcome), bar.write)
                left -= 1
                bar.update()
    finally:
        for worker in workers:
            worker.close(retire=True)
            waiting.put(None)


def _work(worker: ComfyWorker, waiting: queue.Queue, outcomes: queue.Queue) -> None:
    while (task := waiting.get()) is not None:
        try:
            outcomes.put((task, worker.edit(*task)))
        except WorkerGone as gone:
            waiting.put(task)
            outcomes.put(gone)
            return
