"""What studies share: methods run on the benchmark's cases, pictures kept, tables and a contact sheet."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import numpy as np
import torch
from PIL import Image, ImageDraw

from ...metrics.lpips import Lpips
from ...models.files import replacing
from ...models.tiny_studio import scenes, studio
from ..tiny_studio.stage import say
from .tiny_benchmark import Cases, Method, Scores, Studio, draw_cases, run, score

WORK = Path(__file__).resolve().parents[2] / ".studio" / "studies"
COLUMNS = {
    "success": ("success", "{:.1%}"),
    "psnr_db": ("PSNR (dB)", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "kept_db": ("PSNR outside mask (dB)", "{:.2f}"),
    "kept_ssim": ("SSIM outside mask", "{:.3f}"),
    "structure": ("structure distance", "{:.2f}"),
}
AGAINST_TRUE = ("success", "psnr_db", "ssim", "lpips", "kept_db")


@dataclass(frozen=True, eq=False)
class Row:
    """A line of a table: a method and everything that decides its pictures, as text and files."""

    label: str
    method: Method
    settings: str
    files: tuple[Path, ...] = ()


class Study:
    """Runs rows on cases. A row's pictures are kept under a digest of its settings, its files and the
    studio's weights, so that a study goes on where it was stopped and equal rows run once.
    """

    def __init__(self, tiny: Studio, cases: Cases, work: Path = WORK) -> None:
        self.tiny, self.cases, self.work = tiny, cases, work
        self._scores: dict[str, Scores] = {}
        work.mkdir(parents=True, exist_ok=True)
        try:
            self._lpips = Lpips()
        except ValueError as problem:
            say(f"the LPIPS column is empty: {problem}")
            self._lpips = None

    def pictures(self, row: Row) -> torch.Tensor:
        """[cases, 128, 128, 3], 0 to 1, as an 8-bit file would hold them."""
        path = self.work / f"{self._digest(row)}.npy"
        if not path.exists():
            made = run(
                self.tiny,
                self.cases,
                row.method,
                lambda done: say(f"{row.label}: {done}/{len(self.cases)} edits"),
            )
            with replacing(path) as part, part.open("wb") as file:
                np.save(file, (made * 255).round().byte().numpy())
        return torch.from_numpy(np.load(path)).float() / 255

    def scores(self, row: Row) -> Scores:
        key = self._digest(row)
        if key not in self._scores:
            self._scores[key] = score(self.cases, self.pictures(row), self._lpips)
        return self._scores[key]

    def _digest(self, row: Row) -> str:
        digest = hashlib.sha256(repr([self.cases.pairs, row.settings]).encode())
        for file in (studio.FILE, *row.files):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:24]


def table(rows: Mapping[str, Scores], by_type: bool = False, columns: Sequence[str] = AGAINST_TRUE) -> str:
    """A Markdown table, a line for each row; `by_type` adds the success of each edit type."""
    types = scenes.EDIT_TYPES if by_type else ()
    head = ["", *(COLUMNS[name][0] for name in columns), *types]
    lines = [head, ["---"] * len(head)]
    for label, scores in rows.items():
        means = {name: scores.mean(name) for name in columns}
        cells = ["" if math.isnan(mean) else COLUMNS[name][1].format(mean) for name, mean in means.items()]
        cells += [f"{scores.mean('success', edit_type):.0%}" for edit_type in types]
        lines.append([label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def contact_sheet(
    cases: Cases, columns: Mapping[str, tuple[torch.Tensor, torch.Tensor]], a_type: int, path: Path
) -> None:
    """The first `a_type` cases of each type with their texts: source, each column's pictures and true edit.

    columns: by label, pictures and their success; a red frame where the judge does not see the edit.
    """
    numbers = [
        number
        for kind in scenes.EDIT_TYPES
        for number in [i for i, pair in enumerate(cases.pairs) if pair.edit_type == kind][:a_type]
    ]
    fine = torch.ones(len(cases), dtype=torch.bool)
    shown = {"source": (cases.source, fine), **columns, "true edit": (cases.target, fine)}
    cell, line, head = 128, 30, 16
    width, height = len(shown) * (cell + 4), len(numbers) * (cell + line) + head
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (label, (pictures, success)) in enumerate(shown.items()):
        x = column * (cell + 4)
        pen.text((x + 2, 2), label, fill="black")
        for place, number in enumerate(numbers):
            y = head + place * (cell + line)
            sheet.paste(Image.fromarray((pictures[number] * 255).round().byte().numpy()), (x, y))
            if not success[number]:
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline="red", width=3)
    for place, number in enumerate(numbers):
        pair, y = cases.pairs[number], head + place * (cell + line) + cell
        pen.text((2, y + 1), pair.source_text, fill="black", font_size=10)
        pen.text((2, y + 13), f"-> {pair.edit_text}", fill="black", font_size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)


def command(
    prog: str,
    description: str,
    page: Path,
    measure: Callable[[Study], tuple[dict[str, float], str]],
    tune: Callable[[Study], None],
    tuning_a_type: int | None = None,
) -> None:
    """A study's command line: write its `page` and print its figures, or search on the tuning cases."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--tune", action="store_true", help="the search for settings, on the tuning cases")
    parser.add_argument("--json", type=Path, help="write the figures as one flat JSON object")
    args = parser.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    tiny = Studio.load()
    if args.tune:
        tune(Study(tiny, draw_cases(tiny, held_out=False, a_type=tuning_a_type)))
        return
    figures, text = measure(Study(tiny, draw_cases(tiny, held_out=True)))
    page.write_text(text, encoding="utf-8")
    print(text)
    for name, value in figures.items():
        print(f"{name:<40}{value:.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
