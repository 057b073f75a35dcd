"""Stored results of the studies: in `rows/`, a folder for each set of cases, a JSON file for each method.

A file holds the metrics and seconds of the cases by column, and what they were made from: the method's
settings as text, a digest of each file of weights, latents of one edit (`probe`), and the rows of pages that
the method is (`STUDY/TABLE/LABEL`). So a page can say that a row is of earlier weights, settings or code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.files import write_bytes
from ..benchmark.cases import Case
from ..benchmark.results import Result, slug
from .studio import StudioMethod

ROWS = Path(__file__).with_name("rows")
# Of the metrics that a run measures; those against the true edit have `target_`.
STORED = (
    *("success", "l1", "l2", "lpips", "psnr", "ssim", "psnr_outside", "ssim_outside", "structure"),
    *("asked", "leaked"),
    *("target_l1", "target_lpips", "target_psnr", "target_ssim", "target_psnr_inside"),
)
DIGITS = 4  # significant ones of a stored number
TOLERANCE = 0.005  # of a probe, relative to its root mean square
CURRENT, MISSING = "", "not measured"
CODE, ANEW = "code", "run"
MADE = ("settings", "weights", "probe", "device", "method", "rows", "outdated")


@dataclass
class Stored:
    """One file.

    probe: of `StudioMethod.probe`.
    device: what measured it.
    name: of the method.
    rows: of pages, as `STUDY/TABLE/LABEL`.
    outdated: CODE if the code makes other images since, ANEW if it is to be measured anew, else empty.
    """

    settings: str
    weights: dict[str, str]
    probe: list[float]
    device: str
    name: str
    rows: list[str]
    outdated: str
    results: list[Result]


class Store:
    """The stored results on some cases.

    group: name of the cases and their version.
    served: by label of a method, the rows of pages that it is.
    """

    def __init__(
        self, cases: Sequence[Case], group: str, served: Mapping[str, Sequence[str]], folder: Path = ROWS
    ) -> None:
        self._types = {case.id: case.edit_type for case in cases}
        self._served = served
        self._folder = folder / group
        self._files = {file.stem: self._read(file) for file in sorted(self._folder.glob("*.json"))}

    def find(self, method: StudioMethod) -> Stored | None:
        """What is stored of the method, else of the method that was its rows before."""
        exact = self._files.get(slug(method.label))
        wanted = set(self._served.get(method.label, ()))
        return exact or next((found for found in self._files.values() if wanted & set(found.rows)), None)

    def state(self, method: StudioMethod) -> str:
        """CURRENT, MISSING, or how the stored results differ from what the method would give now."""
        found = self.find(method)
        if found is None:
            return MISSING
        changed = {
            "weights": found.weights != method.weights,
            "settings": found.settings != method.settings,
            found.outdated: bool(found.outdated),
        }
        earlier = " and ".join(name for name, is_so in changed.items() if is_so)
        parts = [f"earlier {earlier}"] if earlier else []
        cases = sum(map(method.handles, self._types.values()))
        if len(found.results) < cases:
            parts.append(f"{len(found.results)} of {cases} cases")
        return ", ".join(parts) or CURRENT

    def is_current(self, method: StudioMethod) -> bool:
        """Whether there are results of these settings, weights and code, if only of some cases."""
        return not self.state(method).startswith((MISSING, "earlier"))

    def check(self, method: StudioMethod, probe: Sequence[float]) -> None:
        """Note whether the code makes other images than the stored ones, by the probe."""
        found = self._files.get(slug(method.label))
        if found is None:
            return
        size = math.sqrt(sum(value**2 for value in found.probe) / len(found.probe))
        same = all(abs(a - b) <= TOLERANCE * size for a, b in zip(found.probe, probe, strict=True))
        if not same:
            self._note(method, CODE)
        elif found.outdated == CODE:
            self._note(method, "")

    def give_up(self, method: StudioMethod) -> None:
        """Note that the method is to be measured anew."""
        if slug(method.label) in self._files:
            self._note(method, ANEW)

    def _note(self, method: StudioMethod, outdated: str) -> None:
        found = self._files[slug(method.label)]
        if found.outdated != outdated:
            found.outdated = outdated
            self._save(slug(method.label))

    def add(
        self, method: StudioMethod, results: Sequence[Result], probe: Sequence[float], device: str
    ) -> None:
        """Store results of more cases. Those of earlier weights, settings or code are given up."""
        name = slug(method.label)
        old = self._files.get(name)
        kept = old.results if old is not None and self.is_current(method) else []
        served = self._served.get(method.label, ())
        rows = sorted({*served, *(old.rows if old is not None else ())})
        results = [*kept, *(_rounded(result, name) for result in results)]
        self._files[name] = Stored(
            method.settings, method.weights, list(probe), device, method.name, rows, "", results
        )
        self._save(name)
        for other in self._files.keys() - {name}:
            self._release(other, served)

    def _release(self, name: str, rows: Sequence[str]) -> None:
        """Take rows from a file; without any it is removed."""
        found = self._files[name]
        if not set(found.rows) & set(rows):
            return
        found.rows = [row for row in found.rows if row not in rows]
        if found.rows:
            self._save(name)
        else:
            del self._files[name]
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _save(self, name: str) -> None:
        write_bytes(self._path(name), _text(self._files[name]).encode())

    def _read(self, file: Path) -> Stored:
        """Raises ValueError for a file of another layout."""
        try:
            columns = json.loads(file.read_text(encoding="utf-8"))
            metrics = [name for name in STORED if name in columns]
            results = [
                {
                    "method": file.stem,
                    "name": columns["method"],
                    "swept": None,
                    "case": case,
                    "type": self._types[case],
                    "seconds": columns["seconds"][number],
                    "metrics": {name: columns[name][number] for name in metrics},
                }
                for number, case in enumerate(columns["case"])
            ]
            made = (columns[key] for key in MADE)
            return Stored(*made, results)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({error!r}): remove it and measure again") from None


def _rounded(result: Result, name: str) -> Result:
    """As a file of this name holds it."""
    metrics = {name: _short(value) for name, value in result["metrics"].items() if name in STORED}
    return {**result, "method": name, "seconds": _short(result["seconds"]), "metrics": metrics}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _text(stored: Stored) -> str:
    """One line for each column."""
    results = stored.results
    columns: dict[str, Any] = {
        "method": stored.name,
        "settings": stored.settings,
        "weights": stored.weights,
        "probe": stored.probe,
        "device": stored.device,
        "rows": stored.rows,
        "outdated": stored.outdated,
        "case": [result["case"] for result in results],
        "seconds": [result["seconds"] for result in results],
    }
    for metric in STORED:
        if any(metric in result["metrics"] for result in results):
            columns[metric] = [result["metrics"].get(metric) for result in results]
    lines = (
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
        for key, value in columns.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"
