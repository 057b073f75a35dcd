"""`python dev.py bench bridge`: speed and memory against the stock host, as ratios within one process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import bench_bridge

WHAT = {"bridge": bench_bridge}


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement, in alternating order")
    parser.add_argument("--json", type=Path, help="write the figures as one flat JSON object")
    args = parser.parse_args()
    bench = WHAT[args.what]
    figures = bench.measure(args.rounds)
    print(f"\n{'figure':<28}{'measured':>10}{'aim':>10}")
    for name, value in figures.items():
        aim = bench.AIMS.get(name)
        print(f"{name:<28}{value:>10.3f}{'' if aim is None else f'{aim:.2f}':>10}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
