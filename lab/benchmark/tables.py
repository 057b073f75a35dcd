"""The numbers of a run: means, intervals and differences, as CSV files and as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...models.files import write_bytes
from .results import Result
from .scorer import NETWORKS
from .statistics import Estimate, difference, estimate, values

# Against the source, all but the edit should stay; `target_` metrics compare with the true edit.
SHOWN = (
    *("success", "clip_t", "own_text", "target_psnr", "target_ssim", "target_lpips"),
    *("psnr_outside", "ssim_outside", "lpips_outside", "structure_distance"),
    *("dino_structure", "own_structure"),
    *("lpips", "dino_i", "clip_i", "psnr", "ssim", "l1", "l2", "seconds"),
)
EDITABILITY = ("success", "clip_t", "own_text", "target_psnr_inside", "target_psnr")
FIDELITY = ("dino_structure", "own_structure", "structure_distance", "psnr_outside", "lpips", "psnr")
RANKED = ("target_lpips", "target_psnr", "clip_t", "psnr_outside", "psnr")
LOWER = (
    *("l1", "l2", "lpips", "structure_distance", "dino_structure", "own_structure", "structure"),
    *("seconds", "leaked"),
)


def better(metric: str) -> int:
    """1 if higher is better, -1 if lower is, 0 if neither: the edited region against its source."""
    if metric.endswith("_inside") and not metric.startswith("target_"):
        return 0
    plain = metric.removeprefix("target_").removesuffix("_inside").removesuffix("_outside")
    return -1 if plain in LOWER else 1


class Tables:
    """All numbers of the report.

    overall: by method and metric.
    by_type: by method, edit type and metric.
    differences: each method minus the first, by method and metric.
    editability, fidelity: the metrics of the trade-off, empty if there is none.
    shown: the metrics to show, in order: available ones and those of networks.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = [result for result in results if "error" not in result]
        self.failures = [result for result in results if "error" in result]
        self.methods = list(dict.fromkeys(result["method"] for result in results))
        self.types = sorted({result["type"] for result in self.results})
        names = dict.fromkeys(name for result in self.results for name in result["metrics"])
        self.metrics = [*names, "seconds"]
        self.shown = [name for name in SHOWN if name in self.metrics or name in NETWORKS]
        self.editability, self.fidelity = self._first(EDITABILITY), self._first(FIDELITY)
        self.overall: dict[tuple[str, str], Estimate] = {}
        self.by_type: dict[tuple[str, str, str], Estimate] = {}
        self.differences: dict[tuple[str, str], Estimate] = {}
        for method in self.methods:
            for metric in self.metrics:
                self.overall[method, metric] = self._estimate(self.of(method), metric)
            for kind in self.types:
                for metric in self.shown:
                    self.by_type[method, kind, metric] = self._estimate(self.of(method, kind), metric)
            if method != self.methods[0]:
                for metric in self.shown:
                    pair = (values(self.of(name), metric) for name in (self.methods[0], method))
                    self.differences[method, metric] = difference(*pair)

    @staticmethod
    def _estimate(results: Sequence[Result], metric: str) -> Estimate:
        return estimate(list(values(results, metric).values()))

    def of(self, method: str, kind: str | None = None) -> list[Result]:
        """The results of a method, of one edit type or all."""
        return [r for r in self.results if r["method"] == method and kind in (None, r["type"])]

    def _first(self, names: Iterable[str]) -> str:
        return next((name for name in names if name in self.metrics), "")

    def ranked_by(self, wanted: str | None) -> str:
        """The metric that orders the contact sheet. Raises ValueError for an unknown one."""
        if wanted is not None and wanted not in self.metrics:
            raise ValueError(f"--rank: no metric {wanted}; there are {', '.join(self.metrics)}")
        return wanted or self._first(RANKED) or "seconds"

    def points(self) -> list[tuple[str, str, float | None]]:
        """Name, method and swept value of each method in the trade-off."""
        if not (self.editability and self.fidelity):
            return []
        first = {result["method"]: result for result in reversed(self.results)}
        found = [first[method] for method in self.methods if method in first]
        return [(r["name"], r["method"], r["swept"][1] if r["swept"] else None) for r in found]

    def flat(self) -> dict[str, float | None]:
        """The means over all cases, `METHOD.METRIC`."""
        means = {".".join(key): found.mean for key, found in self.overall.items()}
        return {name: None if math.isnan(mean) else mean for name, mean in means.items()}

    def text(self) -> str:
        """The means as a table for a terminal."""
        shown = [name for name in self.shown if name in self.metrics]
        first = max(map(len, ("method", *self.methods))) + 2
        lines = ["method".ljust(first) + "".join(f"{name:>{_width(name)}}" for name in shown)]
        for method in self.methods:
            cells = (f"{number(self.overall[method, name].mean):>{_width(name)}}" for name in shown)
            lines.append(method.ljust(first) + "".join(cells))
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """One CSV file for each table: every mean with its 95% interval and the number of cases."""
        ends = ("mean", "low", "high", "cases")
        overall = [[*key, *_cells(found)] for key, found in self.overall.items()]
        by_type = [[*key, *_cells(found)] for key, found in self.by_type.items()]
        comparison = [
            [method, self.methods[0], metric, *_cells(found)]
            for (method, metric), found in self.differences.items()
        ]
        tradeoff = [
            [name, method, "" if swept is None else swept]
            + [
                cell
                for part in (self.editability, self.fidelity)
                for cell in _cells(self.overall[method, part])
            ]
            for name, method, swept in self.points()
        ]
        _write(folder / "overall.csv", ("method", "metric", *ends), overall)
        _write(folder / "by_type.csv", ("method", "type", "metric", *ends), by_type)
        _write(folder / "comparison.csv", ("method", "less", "metric", *ends), comparison)
        parts = [f"{part}_{end}" for part in ("editability", "fidelity") for end in ends]
        _write(folder / "tradeoff.csv", ("name", "method", "swept", *parts), tradeoff)


def number(value: float) -> str:
    """For display: three or four digits, a dash for nan."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _width(name: str) -> int:
    return max(len(name), 6) + 2


def _cells(found: Estimate) -> list[str]:
    ends = (found.mean, found.low, found.high)
    return [*("" if math.isnan(value) else f"{value:.6g}" for value in ends), str(found.cases)]


def _write(file: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([head, *rows])
    write_bytes(file, buffer.getvalue().encode())
