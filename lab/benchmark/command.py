"""`python dev.py benchmark`: run methods on a benchmark, measure the edits and write a report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..output import write_json
from . import run_local, run_ray
from .cases import first_of_each_type
from .comfy_worker import own_workers, running_workers
from .html_report import write_report
from .layouts import LAYOUTS, read_cases
from .methods import read_methods
from .results import Results, check_run, write_run
from .scorer import Scorer


def _path(name: str) -> Path:
    return Path(name).resolve()


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return _path(name)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="dev.py benchmark", description=__doc__)
    add = found.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--out", type=_path, required=True, help="the run's folder; an unfinished run in it is continued")
    add("--layout", default="tiny-studio", choices=LAYOUTS, help="the layout of the benchmark")
    add("--data", type=_path, help="the benchmark's folder; the Tiny Studio's cases are drawn and have none")
    add("--split", default="test", help="of the benchmark (test)")
    add("--per-type", type=int, metavar="N", help="only the first N cases of each edit type")
    add("--method", type=_path, metavar="FILE", help="a method file", **several)
    add("--server", metavar="URL", help="a running ComfyUI to use", **several)
    add("--workers", type=_count, default=1, help="ComfyUIs to start without --server (1)")
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="as a Ray Data job, here or on a cluster")
    add("--batch", type=_count, default=8, help="edits per batch of a Ray worker (8)")
    add("--gpus", type=float, help="of a Ray worker (1 if this machine has any, else 0)")
    add("--clip-vision", type=_file, metavar="FILE", help="image half of a CLIP, for CLIP-I and CLIP-T")
    add("--clip", type=_file, metavar="FILE", help="text half of the same CLIP, for CLIP-T")
    add("--rank", metavar="METRIC", help="the metric that orders the contact sheet")
    add("--json", type=Path, metavar="FILE", help="write the means as one flat JSON object")
    add("--report-only", action="store_true", help="write the report again and run nothing")
    return found


def run(options: argparse.Namespace) -> int:
    """Make the edits that are not done; returns how many are left undone."""
    if not options.method:
        raise ValueError("name a method: --method FILE")
    if options.ray is not None and options.server:
        raise ValueError("--ray starts a ComfyUI for each worker: leave --server out")
    methods = read_methods(options.method)
    cases = read_cases(options.layout, options.data, options.split)
    if options.per_type:
        cases = first_of_each_type(cases, options.per_type)
    where = {"layout": options.layout, "folder": str(options.data or ""), "split": options.split}
    settings = check_run(options.out, where, methods)
    scorer = Scorer(options.clip_vision, options.clip)
    write_run(options.out, {**settings, "missing": scorer.missing})
    results = Results(options.out)
    tasks = results.missing(methods, cases)
    print(f"{len(cases)} cases, {len(methods)} methods, {len(tasks)} edits to do", flush=True)
    if not tasks:
        return 0
    if options.ray is not None:
        run_ray.run(tasks, options, results)
    elif options.server:
        run_local.run(tasks, running_workers(options.server, methods), scorer, results)
    else:
        comfyui = Path(os.environ["COMFYUI_PATH"])
        run_local.run(tasks, own_workers(comfyui, options.workers, methods), scorer, results)
    return len(results.missing(methods, cases))


def main(arguments: Sequence[str]) -> int:
    """0; 1 if edits failed or were left undone; 2 for input that cannot be used."""
    options = parser().parse_args(arguments)
    try:
        undone = 0 if options.report_only else run(options)
        tables = write_report(options.out, options.rank)
    except (ValueError, ImportError) as problem:
        print(f"dev.py benchmark: {problem}", file=sys.stderr)
        return 2
    print(tables.text())
    print(options.out / "report.html")
    write_json(options.json, tables.flat())
    failed = len(tables.failures)
    if failed:
        print(f"{failed} edits failed; the same command tries them again", file=sys.stderr)
    if undone:
        print(f"{undone} edits were left undone; the same command continues", file=sys.stderr)
    return 1 if failed or undone else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
