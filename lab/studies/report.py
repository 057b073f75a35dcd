"""`python dev.py report`: the studies' pages, and docs/results.md with all their methods side by side.

The pictures of the cases are kept, so that what a study has made is not made again.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import comfy.utils

from .study import Row, Study, table
from .tiny_benchmark import Scores, Studio, draw_cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
PAGE_TEXT = Path(__file__).with_name("report_page.md")
STUDIES = ("bridge_study", "unify_study")


def side_by_side(study: Study, studies: Sequence[ModuleType]) -> dict[str, Scores]:
    """The scores of the studies' methods by label, a row that several have once.

    Raises ValueError if two rows of one label are different methods.
    """
    rows: dict[str, Row] = {}
    for module in studies:
        for row in module.tables()["methods"]:
            other = rows.setdefault(row.label, row)
            if (other.settings, other.files) != (row.settings, row.files):
                raise ValueError(f"{row.label!r} is two methods: {other.settings} and {row.settings}")
    return {label: study.scores(row) for label, row in rows.items()}


def figure_table(figures: Mapping[str, float]) -> str:
    """A study's figures as a Markdown table: shares of the cases in percent, and decibels."""
    lines = [("metric", ""), ("---", "---")]
    for name, value in figures.items():
        lines.append((f"`{name}`", f"{value:.1%}" if name.startswith("success") else f"{value:.2f}"))
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def write(study: Study, studies: Sequence[ModuleType], page: Path) -> dict[str, float]:
    """Run the studies, write their pages and `page`; returns their figures as `STUDY.FIGURE`."""
    found, parts = {}, []
    for module in studies:
        figures, text = module.measure(study)
        module.PAGE.write_text(text, encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        parts.append(f"## [{title}]({module.PAGE.name})\n\n{figure_table(figures)}")
        found |= {f"{module.PAGE.stem}.{name}": value for name, value in figures.items()}
    text = PAGE_TEXT.read_text(encoding="utf-8").format(
        cases=len(study.cases),
        methods=table(side_by_side(study, studies), by_type=True),
        figures="\n\n".join(parts),
    )
    page.write_text(text, encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py report", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures as one flat JSON object")
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    studies = [importlib.import_module(f".{name}", __package__) for name in STUDIES]
    tiny = Studio.load()
    figures = write(Study(tiny, draw_cases(tiny, held_out=True)), studies, PAGE)
    print(PAGE.read_text(encoding="utf-8"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
