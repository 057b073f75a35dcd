"""`python dev.py benchmark`: judge methods on a benchmark, and draw the report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ...models.files import write_bytes
from . import ray_job, runner
from .adapters import LAYOUTS, read_cases
from .cases import first_of_each_type
from .engine import own_engines, running_engines
from .meter import Meter
from .methods import read_methods
from .report import write_report
from .results import Results, check_run, write_run


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="dev.py benchmark", description=__doc__)
    found.add_argument("--out", type=Path, required=True, help="the run's folder; a run there goes on")
    found.add_argument("--layout", default="tiny-studio", choices=LAYOUTS, help="how the benchmark lies")
    found.add_argument("--data", type=Path, help="the benchmark's folder; tiny-studio is drawn and has none")
    found.add_argument("--split", default="test", help="of a data set or of MagicBrush (test)")
    found.add_argument("--per-type", type=int, metavar="N", help="only the first N cases of each edit type")
    found.add_argument(
        "--method", type=Path, action="append", default=[], metavar="FILE", help="a method file"
    )
    found.add_argument(
        "--server", action="append", default=[], metavar="URL", help="a running ComfyUI to use"
    )
    found.add_argument("--workers", type=_count, default=1, help="ComfyUIs to start without --server (1)")
    found.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="as a Ray Data job, here or on a cluster"
    )
    found.add_argument("--batch", type=_count, default=8, help="edits that a Ray worker is given at once (8)")
    found.add_argument("--gpus", type=float, help="of a Ray worker (1 if this machine has any, else 0)")
    found.add_argument(
        "--clip-vision", type=_file, metavar="FILE", help="image half of a CLIP, for CLIP-I and -T"
    )
    found.add_argument("--clip", type=_file, metavar="FILE", help="text half of the same CLIP, for CLIP-T")
    found.add_argument("--rank", metavar="FIGURE", help="what best and worst mean in the contact sheet")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the means as one flat JSON object")
    found.add_argument("--report-only", action="store_true", help="draw the report anew and run nothing")
    return found


def judge(options: argparse.Namespace) -> int:
    """Do what is still to do; returns how many edits are left undone."""
    if not options.method:
        raise ValueError("name a method: --method FILE")
    if options.ray is not None and options.server:
        raise ValueError("--ray starts a ComfyUI a worker: leave --server out")
    data = None if options.data is None else options.data.resolve()
    methods = read_methods(options.method)
    cases = read_cases(options.layout, data, options.split)
    if options.per_type:
        cases = first_of_each_type(cases, options.per_type)
    where = {"layout": options.layout, "folder": str(data or ""), "split": options.split}
    run = check_run(options.out, where, methods)
    meter = Meter(options.clip_vision, options.clip)
    write_run(options.out, {**run, "missing": meter.missing})
    results = Results(options.out)
    tasks = results.missing(methods, cases)
    print(f"{len(cases)} cases, {len(methods)} methods, {len(tasks)} edits to do", flush=True)
    if not tasks:
        return 0
    comfyui = Path(os.environ["COMFYUI_PATH"])
    if options.ray is not None:
        ray_job.run(tasks, _job(options, data, comfyui), _resources(options), results)
    elif options.server:
        runner.run(tasks, running_engines(options.server, methods), meter, results)
    else:
        runner.run(tasks, own_engines(comfyui, options.workers, methods), meter, results)
    return len(results.missing(methods, cases))


def _job(options: argparse.Namespace, data: Path | None, comfyui: Path) -> ray_job.Job:
    files = {name: getattr(options, name) for name in ("clip_vision", "clip")}
    return ray_job.Job(
        benchmark=(options.layout, data, options.split),
        methods=tuple(file.resolve() for file in options.method),
        out=options.out.resolve(),
        comfyui=comfyui.resolve(),
        **{name: file and file.resolve() for name, file in files.items()},
    )


def _resources(options: argparse.Namespace) -> ray_job.Resources:
    gpus = float(torch.cuda.is_available()) if options.gpus is None else options.gpus
    return ray_job.Resources(options.ray, options.workers, gpus, options.batch)


def main(arguments: Sequence[str]) -> int:
    """0; 1 if edits failed or were left undone; 2 for input that cannot be used."""
    options = parser().parse_args(arguments)
    try:
        undone = 0 if options.report_only else judge(options)
        tables = write_report(options.out, options.rank)
    except (ValueError, ImportError) as problem:
        print(f"dev.py benchmark: {problem}", file=sys.stderr)
        return 2
    print(tables.text())
    print(options.out / "report.html")
    if options.json is not None:
        write_bytes(options.json, (json.dumps(tables.flat(), indent=1) + "\n").encode())
    if tables.failed:
        print(f"{tables.failed} edits failed; the same command tries them again", file=sys.stderr)
    if undone:
        print(f"{undone} edits were left undone; the same command goes on", file=sys.stderr)
    return 1 if tables.failed or undone else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
