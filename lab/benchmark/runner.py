"""Edits on several ComfyUIs at once, measured and written as they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from tqdm import tqdm

from .cases import Case
from .engine import Engine, EngineGone, Outcome
from .meter import Meter
from .methods import Method
from .results import Results

Task = tuple[Method, Case]


def run(tasks: Sequence[Task], engines: Sequence[Engine], meter: Meter, results: Results) -> None:
    """Do the tasks. Some are left undone only if all engines had to be given up.

    An engine works in a thread of its own, and measuring in this one. Engines are stopped at the end.
    """
    waiting: queue.Queue[Task | None] = queue.Queue()
    outcomes: queue.Queue[tuple[Task, Outcome] | EngineGone] = queue.Queue()
    for task in tasks:
        waiting.put(task)
    for engine in engines:
        threading.Thread(target=_work, args=(engine, waiting, outcomes), daemon=True).start()
    left, working = len(tasks), len(engines)
    try:
        with tqdm(total=left, unit="edit", desc="benchmark") as bar:
            while left and working:
                event = outcomes.get()
                if isinstance(event, EngineGone):
                    working -= 1
                    bar.write(f"given up: {event}")
                    continue
                (method, case), outcome = event
                line = meter.line(results.folder, method, case, outcome)
                if "error" in line:
                    bar.write(f"{method.label}, {case.id}: {line['error']}")
                results.append(line)
                left -= 1
                bar.update()
    finally:
        for engine in engines:
            engine.close(retire=True)
            waiting.put(None)


def _work(engine: Engine, waiting: queue.Queue, outcomes: queue.Queue) -> None:
    while (task := waiting.get()) is not None:
        try:
            outcomes.put((task, engine.attempt(*task)))
        except EngineGone as gone:
            waiting.put(task)
            outcomes.put(gone)
            return
