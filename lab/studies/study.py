"""Shared by both studies: running methods on cases, tables, the page and the command line."""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from PIL import Image

from ...metrics.image import measure_edit
from ...models.tiny_studio import scenes
from ...pictures.contact_sheet import draw_sheet, save_image, to_image
from ..benchmark.cases import Case, first_of_each_type
from ..benchmark.layouts import read_cases
from ..benchmark.results import Result, Results, check_run, new_result, picture_file, save_picture, write_run
from ..benchmark.scorer import Scorer, as_rows, to_tensor
from ..benchmark.statistics import mean
from ..output import DOCS, markdown, write_json, write_page
from ..tiny_studio.attribute_classifier import shows
from ..tiny_studio.stage import say
from .studio import BATCH, Batch, Studio, StudioMethod, structure_distance

WORK = Path(__file__).resolve().parents[2] / ".studio" / "studies"
COLUMNS = {
    "success": ("success", "{:.1%}"),
    "target_psnr": ("PSNR (dB)", "{:.2f}"),
    "target_ssim": ("SSIM", "{:.3f}"),
    "target_lpips": ("LPIPS", "{:.3f}"),
    "psnr_outside": ("PSNR outside mask (dB)", "{:.2f}"),
    "ssim_outside": ("SSIM outside mask", "{:.3f}"),
    "structure": ("structure distance", "{:.2f}"),
}
AGAINST_TRUE = ("success", "target_psnr", "target_ssim", "target_lpips", "psnr_outside")
Rows = Mapping[str, StudioMethod]  # of a table, by label


class Study:
    """Methods on cases of the Tiny Studio, with results kept like those of a benchmark.

    Results are in a folder for each split and version of the cases, so a stopped study continues and equal
    methods run once. `dev.py benchmark --report-only --out FOLDER` writes their report.
    """

    def __init__(self, tiny: Studio, cases: Sequence[Case], split: str, work: Path = WORK) -> None:
        self.tiny, self.cases, self._split = tiny, cases, split
        digest = hashlib.sha256(repr([case.drawn and case.drawn.pair for case in cases]).encode()).hexdigest()
        self.results = Results(work / f"{split}-{digest[:12]}")
        scorer = Scorer()
        self._networks = {name: net for name, net in scorer.networks.items() if name == "lpips"}
        self._missing = scorer.missing

    def run(self, methods: Iterable[StudioMethod]) -> None:
        """Make and measure the missing edits."""
        distinct = list({method.label: method for method in methods}.values())
        where = {"layout": "tiny-studio", "folder": "", "split": self._split}
        settings = check_run(self.results.folder, where, distinct)
        write_run(self.results.folder, {**settings, "missing": self._missing})
        for start in range(0, len(self.cases), BATCH):
            cases = self.cases[start : start + BATCH]
            todo = [method for method in distinct if self.results.missing([method], cases)]
            if not todo:
                continue
            batch = Batch.of(self.tiny, cases)
            for method in todo:
                missing = {case.id for _, case in self.results.missing([method], cases)}
                numbers = [number for number, case in enumerate(cases) if case.id in missing]
                self._edit(method, [cases[number] for number in numbers], batch.chosen(numbers))
                say(f"{method.name}: {start + len(cases)}/{len(self.cases)} edits")

    def _edit(self, method: StudioMethod, cases: Sequence[Case], batch: Batch) -> None:
        begin = time.process_time()
        made = method.pictures(self.tiny, batch)
        seconds = (time.process_time() - begin) / len(cases)
        made = (made * 255).round().byte().float() / 255  # as a file holds it
        found = measure_edit(made, batch.source, batch.target, batch.mask, self._networks)
        found["success"] = torch.tensor(shows(made, [pair.target for pair in batch.pairs])).float()
        found["structure"] = structure_distance(self.tiny, batch, made)
        for case, picture, metrics in zip(cases, made, as_rows(found), strict=True):
            save_picture(self.results.folder, method.label, case.id, to_image(picture))
            self.results.append(new_result(method, case, seconds, metrics))

    def of(self, method: StudioMethod) -> list[Result]:
        """The results of a method on the study's cases."""
        return [result for result in self.results.all if result["method"] == method.label]

    def mean(self, method: StudioMethod, metric: str = "success") -> float:
        return mean(self.of(method), metric)

    def worst_type(self, method: StudioMethod) -> float:
        """The success of the edit type with the lowest success."""
        kinds = {case.edit_type for case in self.cases}
        return min(value for kind, value in by_type(self.of(method)).items() if kind in kinds)

    def picture(self, method: StudioMethod, case: Case) -> torch.Tensor:
        """[height, width, 3], 0 to 1."""
        with Image.open(picture_file(self.results.folder, method.label, case.id)) as picture:
            return to_tensor(picture)[0]

    def table(self, rows: Rows, columns: Sequence[str] = AGAINST_TRUE) -> str:
        """A Markdown table: means of `columns`, and the success of each edit type."""
        return table({label: self.of(method) for label, method in rows.items()}, columns)

    def draw(self, rows: Rows, file: Path) -> None:
        """A contact sheet of two cases of each type: source, the methods' pictures and the true edit.

        A red frame marks an edit without success.
        """
        cases = first_of_each_type(self.cases, 2)
        drawn = Batch.of(self.tiny, cases)
        columns: list[tuple[str, Any]] = [("source", drawn.source)]
        columns += [(label, [self.picture(method, c) for c in cases]) for label, method in rows.items()]
        columns.append(("true edit", drawn.target))
        failed = [
            {result["case"] for result in self.of(method) if not result["metrics"]["success"]}
            for method in rows.values()
        ]
        blank = [""] * len(rows)
        captions = [[case.source_description, *blank, case.edit_description] for case in cases]
        framed = [[False, *(case.id in missed for missed in failed), False] for case in cases]
        save_image(to_image(draw_sheet(columns, 128, captions, framed)[0]), file)


def by_type(results: Sequence[Result]) -> dict[str, float]:
    """Success by edit type."""
    return {
        kind: mean([result for result in results if result["type"] == kind], "success")
        for kind in scenes.EDIT_TYPES
    }


def table(rows: Mapping[str, Sequence[Result]], columns: Sequence[str] = AGAINST_TRUE) -> str:
    """A Markdown table of results by label: means of `columns`, and the success of each edit type."""
    lines = []
    for label, results in rows.items():
        means = {name: mean(results, name) for name in columns}
        cells = ["" if math.isnan(value) else COLUMNS[name][1].format(value) for name, value in means.items()]
        lines.append([label, *cells, *(f"{value:.0%}" for value in by_type(results).values())])
    return markdown(["", *(COLUMNS[name][0] for name in columns), *scenes.EDIT_TYPES], lines)


@dataclass(frozen=True, eq=False)
class Plan:
    """A study.

    name: of its page.
    columns: of the page's tables.
    tables: the methods of each table by label, by the name that the page gives it; `methods` is the main one.
    metrics: the numbers for machines.
    texts: the page's values beside the tables, by name.
    tune: prints the search for settings on the tuning cases.
    shown: how many methods the contact sheet shows.
    """

    name: str
    columns: Sequence[str]
    tables: Callable[[], dict[str, Rows]]
    metrics: Callable[[Study, Mapping[str, Rows]], dict[str, float]]
    texts: Callable[[Study, Mapping[str, Rows], Mapping[str, float]], dict[str, Any]]
    tune: Callable[[Study], None]
    shown: int


def publish(study: Study, plan: Plan, docs: Path = DOCS) -> tuple[dict[str, float], str]:
    """Run a study and write its page and picture; returns its metrics and the page."""
    rows = plan.tables()
    study.run(method for some in rows.values() for method in some.values())
    metrics = plan.metrics(study, rows)
    study.draw(dict(list(rows["methods"].items())[: plan.shown]), docs / "pictures" / f"{plan.name}.jpg")
    values = {name: study.table(some, plan.columns) for name, some in rows.items()}
    values |= plan.texts(study, rows, metrics)
    template = Path(__file__).with_name(f"{plan.name}_page.md")
    text = write_page(template, docs / f"{plan.name}.md", {"cases": len(study.cases), **values})
    return metrics, text


def command(prog: str, description: str | None, plan: Plan, tuning_per_type: int = 10) -> None:
    """The command line of a study: write its page and print its metrics, or search for settings."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--tune", action="store_true", help="the search for settings, on the tuning cases")
    parser.add_argument("--json", type=Path, help="write the metrics as one flat JSON object")
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    split = "tuning" if args.tune else "test"
    cases = read_cases("tiny-studio", None, split)
    tiny = Studio.load()
    if args.tune:
        plan.tune(Study(tiny, first_of_each_type(cases, tuning_per_type), split))
        return
    metrics, text = publish(Study(tiny, cases, split), plan)
    print(text)
    for name, value in metrics.items():
        print(f"{name:<40}{value:.3f}")
    write_json(args.json, metrics)
