"""Shared by the studies: running methods on cases, tables, the pages and the command line."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...metrics.image import measure_edit
from ...pictures.contact_sheet import draw_sheet, save_image, to_image
from ..benchmark.cases import Case, first_of_each_type
from ..benchmark.html_report import chosen
from ..benchmark.results import Result, new_result
from ..benchmark.scorer import Scorer, as_rows
from ..benchmark.statistics import Estimate, difference, mean, values
from ..benchmark.tables import better
from ..output import markdown
from ..tiny_studio.attribute_classifier import bound, shows
from ..tiny_studio.stage import say
from .rows import CURRENT, ROWS, Store
from .studio import BATCH, Batch, Studio, StudioMethod, quick_products, structure_distance

COLUMNS = {
    "success": ("success", "{:.1%}"),
    "asked": ("asked", "{:.1%}"),
    "leaked": ("leaked", "{:.1%}"),
    "target_psnr": ("PSNR (dB)", "{:.2f}"),
    "target_ssim": ("SSIM", "{:.3f}"),
    "target_lpips": ("LPIPS", "{:.3f}"),
    "psnr_outside": ("PSNR outside mask (dB)", "{:.2f}"),
    "ssim_outside": ("SSIM outside mask", "{:.3f}"),
    "structure": ("structure distance", "{:.2f}"),
    "seconds": ("CPU seconds an edit", "{:.2f}"),
}
FRACTIONS = ("success", "asked", "leaked")
AGAINST_TRUE = ("success", "target_psnr", "target_ssim", "target_lpips", "psnr_outside")
Rows = Mapping[str, StudioMethod]  # of a table, by label
Tables = Mapping[str, Rows]  # by name
Row = tuple[str, StudioMethod]


class Study:
    """Methods on cases of the Tiny Studio, with stored results.

    tables: what the methods are rows of, by study.
    """

    def __init__(
        self,
        tiny: Studio,
        cases: Sequence[Case],
        split: str,
        tables: Mapping[str, Tables] | None = None,
        folder: Path = ROWS,
    ) -> None:
        self.tiny, self.cases = tiny, cases
        digest = hashlib.sha256(repr([case.drawn and case.drawn.pair for case in cases]).encode()).hexdigest()
        self.store = Store(cases, f"{split}-{digest[:12]}", _served(tables or {}), folder)

    def run(self, methods: Iterable[StudioMethod], per_type: int | None = None) -> None:
        """Make and measure the edits that are not stored, or only of earlier weights, settings or code.

        per_type: only the first cases of each edit type.
        """
        cases = first_of_each_type(self.cases, per_type or len(self.cases))
        lpips = {name: net for name, net in Scorer().networks.items() if name == "lpips"}
        for method in {method.label: method for method in methods}.values():
            probe = self.check(method)
            found = self.store.find(method)
            done = {r["case"] for r in found.results} if found and self.store.is_current(method) else set()
            edited = [case for case in cases if method.handles(case.edit_type)]
            todo = [case for case in edited if case.id not in done]
            for start in range(0, len(todo), BATCH):
                some = todo[start : start + BATCH]
                self.store.add(method, self._edit(method, some, lpips), probe, self._device())
                say(f"{method.name}: {len(done) + start + len(some)}/{len(edited)} edits")

    def check(self, method: StudioMethod) -> list[float]:
        """The method's probe, on one thread so that machines agree, compared with the stored one."""
        first = next(case for case in self.cases if method.handles(case.edit_type))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            probe = method.probe(self.tiny, Batch.of(self.tiny, [first]))
        finally:
            torch.set_num_threads(threads)
        self.store.check(method, probe)
        return probe

    def _edit(self, method: StudioMethod, cases: Sequence[Case], networks: Mapping[str, Any]) -> list[Result]:
        batch = Batch.of(self.tiny, cases)
        begin = time.process_time()
        made = method.pictures(self.tiny, batch)
        seconds = (time.process_time() - begin) / len(cases)
        made = (made * 255).round().byte().float() / 255  # as a file holds it
        found = measure_edit(made, batch.source, batch.target, batch.mask, networks)
        found["success"] = torch.tensor(shows(made, [pair.target for pair in batch.pairs])).float()
        if all(pair.target.kind == "two" for pair in batch.pairs):
            found |= {name: torch.tensor(marks).float() for name, marks in bound(made, batch.pairs).items()}
        found["structure"] = structure_distance(self.tiny, batch, made)
        rows = zip(cases, as_rows(found), strict=True)
        return [new_result(method, case, seconds, metrics) for case, metrics in rows]

    def _device(self) -> str:
        name = comfy.model_management.get_torch_device_name(self.tiny.model.load_device)
        return f"{name}, bfloat16 products" if quick_products(self.tiny)._enabled else name

    def of(self, method: StudioMethod) -> list[Result]:
        """The stored results of a method."""
        found = self.store.find(method)
        return found.results if found else []

    def mean(self, method: StudioMethod, metric: str = "success") -> float:
        return mean(self.of(method), metric)

    def worst_type(self, method: StudioMethod) -> float:
        """The success of the edit type with the lowest success."""
        return min(by_type(self.of(method)).values(), default=math.nan)

    def difference(self, first: StudioMethod, second: StudioMethod, metric: str) -> Estimate:
        """First minus second, case by case."""
        return difference(values(self.of(second), metric), values(self.of(first), metric))

    def label(self, label: str, method: StudioMethod) -> str:
        """The label, and behind it what the stored results are if they are not current."""
        state = self.store.state(method)
        return f"{label} ({state})" if state else label

    def table(self, rows: Rows, columns: Sequence[str] = AGAINST_TRUE) -> str:
        """A Markdown table: means of `columns`, and the success of each edit type if there are several."""
        kinds = list(dict.fromkeys(case.edit_type for case in self.cases))
        kinds = kinds if len(kinds) > 1 else []
        lines = []
        for label, method in rows.items():
            cells = [cell(self.mean(method, name), COLUMNS[name][1]) for name in columns]
            success = by_type(self.of(method))
            cells += [cell(success.get(kind, math.nan), "{:.0%}") for kind in kinds]
            lines.append([self.label(label, method), *cells])
        return markdown(["", *(COLUMNS[name][0] for name in columns), *kinds], lines)

    def differences(self, rows: Rows, columns: Sequence[str]) -> str:
        """A Markdown table: each row minus the first one, case by case, with 95% intervals."""
        (first, base), *others = rows.items()
        lines = [
            [label, *(shown(self.difference(method, base, name), name) for name in columns)]
            for label, method in others
        ]
        return markdown([f"minus {first}", *(COLUMNS[name][0] for name in columns)], lines)

    def summary(self, tables: Tables) -> str:
        """One sentence: of how many rows the results are what the code gives now, and what measured them."""
        methods = {method.label: method for rows in tables.values() for method in rows.values()}.values()
        current = sum(self.store.state(method) == CURRENT for method in methods)
        found = [stored for method in methods if (stored := self.store.find(method))]
        devices = ", ".join(sorted({stored.device for stored in found})) or "nothing"
        if current == len(methods):
            return f"All rows are of the weights, settings and code of this version. Measured on: {devices}."
        return (
            f"{current} of {len(methods)} rows are complete and of the weights, settings and code of this "
            f"version; the others say what they are. Measured on: {devices}."
        )

    def draw(self, rows: Rows, file: Path) -> None:
        """A contact sheet of the best, median and worst cases of the first row, by PSNR to the true edit:
        source, the methods' pictures and the true edit. A red frame marks an edit without success.
        """
        groups = chosen(self.of(next(iter(rows.values()))), "target_psnr")
        known = {case.id: case for case in self.cases}
        picked = [(group, known[r["case"]]) for group, results in groups.items() for r in results]
        cases = [case for _, case in picked]
        batch = Batch.of(self.tiny, cases)
        columns: list[tuple[str, Any]] = [("source", batch.source)]
        failed = []
        for label, method in rows.items():
            made = method.pictures(self.tiny, batch)
            columns.append((label, made))
            failed.append([not good for good in shows(made, [pair.target for pair in batch.pairs])])
        columns.append(("true edit", batch.target))
        blank = [""] * len(rows)
        captions = [[f"{group}: {c.source_description}", *blank, c.edit_description] for group, c in picked]
        framed = [[False, *(missed[row] for missed in failed), False] for row in range(len(cases))]
        save_image(to_image(draw_sheet(columns, 128, captions, framed)[0]), file)


def _served(tables: Mapping[str, Tables]) -> dict[str, list[str]]:
    """By label of a method, the rows that it is, as `STUDY/TABLE/LABEL`."""
    found: dict[str, list[str]] = {}
    for study, some in tables.items():
        for table, rows in some.items():
            for label, method in rows.items():
                found.setdefault(method.label, []).append(f"{study}/{table}/{label}")
    return found


def by_type(results: Sequence[Result]) -> dict[str, float]:
    """Success by edit type."""
    kinds = dict.fromkeys(result["type"] for result in results)
    return {kind: mean([result for result in results if result["type"] == kind], "success") for kind in kinds}


def cell(value: float, form: str) -> str:
    """A value in a table; empty if it is not known."""
    return "" if math.isnan(value) else form.format(value)


def unit(metric: str) -> tuple[int, int]:
    """What a difference is multiplied with to be shown, and its decimals: fractions are in points."""
    return (100, 1) if metric in FRACTIONS else (1, 2 if "psnr" in metric else 3)


def shown(found: Estimate, metric: str) -> str:
    """A difference with its interval."""
    if not found.cases:
        return ""
    scale, digits = unit(metric)
    mean_, low, high = (f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean_} ({low} to {high})"


def best(found: Iterable[float]) -> float:
    """The largest of those that are known; nan without any."""
    return max((value for value in found if not math.isnan(value)), default=math.nan)


def strongest(study: Study, rows: Iterable[Row], metric: str = "success") -> Row:
    """The row with the best mean; those that are not measured come last."""

    def score(row: Row) -> float:
        value = better(metric) * study.mean(row[1], metric)
        return -math.inf if math.isnan(value) else value

    return max(rows, key=score)
