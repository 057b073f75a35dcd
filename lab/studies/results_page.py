"""`python dev.py report`: the pages of both studies, and docs/results.md with all their methods together.

Results are kept, so finished edits are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.utils

from ..benchmark.layouts import read_cases
from ..output import DOCS, markdown, write_json, write_page
from . import bridge_study, unify_study
from .studio import Studio
from .study import Plan, Rows, Study, publish

TEMPLATE = Path(__file__).with_name("results_page.md")


def side_by_side(plans: Sequence[Plan]) -> Rows:
    """The methods of the studies by label. Raises ValueError if two different methods have one label."""
    rows: dict = {}
    for plan in plans:
        for label, method in plan.tables()["methods"].items():
            other = rows.setdefault(label, method)
            if other.digest != method.digest:
                raise ValueError(f"{label!r} is two methods: {other.settings} and {method.settings}")
    return rows


def metric_table(metrics: Mapping[str, float]) -> str:
    """A study's metrics as a Markdown table: fractions of the cases in percent, and decibels."""
    rows = [
        (f"`{name}`", f"{value:.1%}" if name.startswith("success") else f"{value:.2f}")
        for name, value in metrics.items()
    ]
    return markdown(("metric", ""), rows)


def write(study: Study, plans: Sequence[Plan], docs: Path = DOCS) -> tuple[dict[str, float], str]:
    """Run the studies and write all pages; returns the metrics as `STUDY.METRIC`, and docs/results.md."""
    found, parts = {}, []
    for plan in plans:
        metrics, text = publish(study, plan, docs)
        title = text.splitlines()[0].removeprefix("# ")
        parts.append(f"## [{title}]({plan.name}.md)\n\n{metric_table(metrics)}")
        found |= {f"{plan.name}.{name}": value for name, value in metrics.items()}
    values = {
        "cases": len(study.cases),
        "methods": study.table(side_by_side(plans)),
        "metrics": "\n\n".join(parts),
    }
    return found, write_page(TEMPLATE, docs / "results.md", values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py report", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the metrics as one flat JSON object")
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    study = Study(Studio.load(), read_cases("tiny-studio", None, "test"), "test")
    metrics, text = write(study, (bridge_study.PLAN, unify_study.PLAN))
    print(text)
    write_json(args.json, metrics)


if __name__ == "__main__":
    main()
