"""`python dev.py bench bridge|unify|start|templates|training`: speed and memory.

`bridge` and `unify` are compared with the stock host, as ratios in one process, in two regimes: SD1.5's full
width, where arithmetic rules, and the same depth at 32 channels on 8x8 latents, where launches rule, as on a
fast card. On a GPU both are measured there, in float16, with its name in the results. `start` measures what
the pack adds to the host's start, `templates` the time from Run to picture of each template that needs no
download. `training` computes the memory of training a bridge; it has its own arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import comfy.utils

from ..output import write_json
from . import bridge as bench_bridge
from . import start as bench_start
from . import templates as bench_templates
from . import training as bench_training
from . import unify as bench_unify
from .measuring import on_card

WHAT = {"bridge": bench_bridge, "unify": bench_unify}
SERVERS = {"start": bench_start, "templates": bench_templates}
REGIMES = ("narrow", "wide")


def main() -> None:
    if sys.argv[1:2] == ["training"]:
        del sys.argv[1]
        bench_training.main()
        return
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    training = "training has its own arguments: dev.py bench training --help"
    parser.add_argument("what", choices=(*WHAT, *SERVERS, "training"), help=training)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of each measurement, in alternating order"
    )
    parser.add_argument("--regime", choices=REGIMES, action="append", help="measure this one only")
    parser.add_argument("--json", type=Path, help="write the results as one flat JSON object")
    parser.add_argument(
        "--attend-and-excite", action="store_true", help="unify: also time diffusers' pipeline, if installed"
    )
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    where = on_card()
    if args.what in SERVERS:
        found, aims = SERVERS[args.what].measure(args.rounds), SERVERS[args.what].AIMS
    else:
        bench = WHAT[args.what]
        found, aims = _regimes(bench, args), {**bench.AIMS, **(bench.CARD_AIMS if where else {})}
    print(f"\n{'metric':<36}{'measured':>10}{'aim':>10}")
    for name, value in found.items():
        aim = aims.get(name)
        print(f"{name:<36}{value:>10.3f}{'' if aim is None else f'{aim:.2f}':>10}")
    write_json(args.json, found | where)


def _regimes(bench: ModuleType, args: argparse.Namespace) -> dict[str, float]:
    found: dict[str, float] = {}
    regimes = args.regime or REGIMES
    if "narrow" in regimes:
        found |= bench.narrow(args.rounds)
    if "wide" in regimes:
        extra = {"compare": True} if args.attend_and_excite else {}
        found |= bench.wide(args.rounds, **extra)
    return found


if __name__ == "__main__":
    main()
