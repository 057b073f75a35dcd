"""A run's results as tables, for people and as CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...models.files import write_bytes
from .meter import NETWORKS
from .results import Line
from .statistics import Estimate, difference, estimate, values

# Against the source, what is not the edit should stay; `target_` figures compare with the true edit.
SHOWN = (
    *("success", "clip_t", "target_psnr", "target_ssim", "target_lpips"),
    *("psnr_outside", "ssim_outside", "lpips_outside", "structure_distance"),
    *("lpips", "dino_i", "clip_i", "psnr", "ssim", "l1", "l2", "seconds"),
)
EDITABILITY = ("success", "clip_t", "target_psnr_inside", "target_psnr")
FIDELITY = ("structure_distance", "psnr_outside", "lpips", "psnr")
RANKED = ("target_lpips", "target_psnr", "clip_t", "psnr_outside", "psnr")
LOWER = ("l1", "l2", "lpips", "structure_distance", "seconds")


def base(figure: str) -> str:
    """The name without its region and what it is measured against."""
    return figure.removeprefix("target_").removesuffix("_inside").removesuffix("_outside")


def better(figure: str) -> int:
    """1 where more is better, -1 where less is, 0 for neither: the edited region against its source."""
    if figure.endswith("_inside") and not figure.startswith("target_"):
        return 0
    return -1 if base(figure) in LOWER else 1


@dataclass(frozen=True)
class Row:
    """One number of a table. group: an edit type, or the method that this one is compared with."""

    method: str
    group: str
    figure: str
    estimate: Estimate


@dataclass(frozen=True)
class Point:
    """A method in the trade-off. swept: its value in a sweep, None outside of one."""

    name: str
    method: str
    swept: float | None
    editability: Estimate
    fidelity: Estimate


class Tables:
    """Everything the report counts. lines: results, failed ones among them."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = [line for line in lines if "error" not in line]
        self.errors = [line for line in lines if "error" in line]
        self.failed = len(self.errors)
        self.methods = list(dict.fromkeys(line["method"] for line in lines))
        self.types = sorted({line["type"] for line in self.lines})
        self.figures = [*dict.fromkeys(name for line in self.lines for name in line["figures"]), "seconds"]
        self.overall = [
            Row(method, "", figure, estimate(list(values(self.of(method), figure).values())))
            for method in self.methods
            for figure in self.figures
        ]
        self.by_type = [
            Row(method, kind, figure, estimate(list(values(self.of(method, kind), figure).values())))
            for method in self.methods
            for kind in self.types
            for figure in self.shown()
        ]
        self.comparison = [
            Row(
                method,
                self.methods[0],
                figure,
                difference(values(self.of(self.methods[0]), figure), values(self.of(method), figure)),
            )
            for method in self.methods[1:]
            for figure in self.shown()
        ]
        self.editability, self.fidelity = self._first(EDITABILITY), self._first(FIDELITY)
        self.points = self._points() if self.editability and self.fidelity else []

    def of(self, method: str, kind: str | None = None) -> list[Line]:
        """A method's results, of one edit type or all."""
        return [line for line in self.lines if line["method"] == method and kind in (None, line["type"])]

    def shown(self) -> list[str]:
        """The figures for people, in order: those that are there, and the networks that could be."""
        return [name for name in SHOWN if name in self.figures or name in NETWORKS]

    def _first(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self.figures), None)

    def ranked_by(self, wanted: str | None) -> str:
        """The figure that says what best and worst are. Raises ValueError for one that is not there."""
        if wanted is not None and wanted not in self.figures:
            raise ValueError(f"--rank: no figure {wanted}; there are {', '.join(self.figures)}")
        return wanted or self._first(RANKED) or "seconds"

    def _points(self) -> list[Point]:
        points = []
        for method in self.methods:
            lines = self.of(method)
            if not lines:
                continue
            made, kept = (
                estimate(list(values(lines, figure).values())) for figure in (self.editability, self.fidelity)
            )
            swept = lines[0]["swept"]
            points.append(Point(lines[0]["name"], method, swept[1] if swept else None, made, kept))
        return points

    def flat(self) -> dict[str, float | None]:
        """The means over all cases, `METHOD.FIGURE`."""
        means = {f"{row.method}.{row.figure}": row.estimate.mean for row in self.overall}
        return {name: None if math.isnan(mean) else mean for name, mean in means.items()}

    def text(self) -> str:
        """The means as a table for a terminal."""
        shown = [name for name in self.shown() if name in self.figures]
        means = {(row.method, row.figure): row.estimate.mean for row in self.overall}
        first = max(map(len, ("method", *self.methods))) + 2
        widths = [max(len(name), 6) + 2 for name in shown]
        heads = "".join(f"{name:>{width}}" for name, width in zip(shown, widths, strict=True))
        lines = ["method".ljust(first) + heads]
        for method in self.methods:
            cells = [
                f"{number(means[method, name]):>{width}}" for name, width in zip(shown, widths, strict=True)
            ]
            lines.append(method.ljust(first) + "".join(cells))
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """A CSV file a table, all with a mean, its 95% interval and the number of cases."""
        ends = ("mean", "low", "high", "cases")
        _write(folder / "overall.csv", ("method", "figure", *ends), map(_cells, self.overall))
        _write(folder / "by_type.csv", ("method", "type", "figure", *ends), map(_cells, self.by_type))
        _write(folder / "comparison.csv", ("method", "less", "figure", *ends), map(_cells, self.comparison))
        parts = ("editability", "fidelity")
        _write(
            folder / "tradeoff.csv",
            ("name", "method", "swept", *(f"{part}_{end}" for part in parts for end in ends)),
            [
                [p.name, p.method, "" if p.swept is None else p.swept]
                + [cell for part in parts for cell in _numbers(getattr(p, part))]
                for p in self.points
            ],
        )


def number(value: float) -> str:
    """For people: three or four digits, a dash for none."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _numbers(found: Estimate) -> list[str]:
    ends = (found.mean, found.low, found.high)
    return [*("" if math.isnan(value) else f"{value:.6g}" for value in ends), str(found.cases)]


def _cells(row: Row) -> list[str]:
    return [row.method, *([row.group] if row.group else []), row.figure, *_numbers(row.estimate)]


def _write(file: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(head)
    writer.writerows(rows)
    write_bytes(file, buffer.getvalue().encode())
