"""`python dev.py calibrate --checkpoint FILE --pairs DIR`: the settings of UnifyEdit for a checkpoint.

DIR is a benchmark folder (docs/benchmark.md): `cases.jsonl` with pictures, two descriptions of each, and
masks if there are any. One setting after the other is varied, the rest as chosen so far: denoise, cfg,
structure, words. A setting's score is how much of the edit is made less how much of the structure changes
(outside the mask, where there is one), each relative to an edit from full noise without both losses. The edit
is judged by CLIP-T and the structure by DINO where their files are, else by the model (`model_judge.py`).

Every edit is kept in --out, so a stopped search continues. There are also the report of a benchmark
(report.html), a table (settings.md), a contact sheet (sheet.jpg) and the settings to type in (settings.json).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import comfy.sd
import comfy.utils
import safetensors
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image, ImageOps

from ..models.files import write_bytes
from ..models.tiny_studio import studio
from ..patches.unify.balance import Balance
from ..patches.unify.edit import edit_latent
from ..patches.unify.settings import UnifyOptions
from ..patches.unify.tokens import EditTokens, find_tokens
from ..pictures.contact_sheet import draw_sheet, save_image, to_image
from ..training.pairs import Picture
from .benchmark.cases import PICTURES, Case, CaseError
from .benchmark.html_report import write_report
from .benchmark.layouts import read_cases
from .benchmark.results import Result, Results, check_run, new_result, picture_file, save_picture, write_run
from .benchmark.scorer import Scorer, to_tensor
from .benchmark.statistics import mean
from .model_judge import structure_change, structure_maps, text_fit
from .output import markdown, write_json

GRID: Mapping[str, tuple[float, ...]] = {
    "denoise": (1.0, 0.8, 0.6, 0.4),
    "cfg": (2.0, 3.0, 5.0, 7.5),
    "structure": (0.3, 0.5, 1.0, 2.0),
    "words": (0.0, 0.1, 0.3, 1.0),
}
SHOWN = 8  # cases in the contact sheet
CELL = 8  # pixels along each side of a latent cell


@dataclass(frozen=True)
class Setting:
    """What is typed into the node UnifyEdit, as a Method of the benchmark."""

    denoise: float = 1.0
    cfg: float = 7.5
    structure: float = Balance.beta1
    words: float = Balance.beta2
    steps: int = 50

    name: ClassVar[str] = "UnifyEdit"
    swept: ClassVar[None] = None

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items())

    @property
    def digest(self) -> str:
        return self.label


# What the template "start here" sets for the Tiny Studio.
TINY = Setting(denoise=0.6, cfg=2.0, steps=25)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model with its text encoder and its VAE."""

    model: ModelPatcher
    clip: Any
    vae: Any

    @classmethod
    def load(cls, file: Path) -> tuple[Checkpoint, Setting]:
        """A checkpoint, or the Tiny Studio's file, with the settings to start from.

        Raises ValueError for a file of another kind.
        """
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, "pt") as opened:
                    names = set(opened.keys())
                if "text.table" in names:
                    return cls(studio.load_model(file), studio.load_clip(file), studio.load_vae(file)), TINY
            model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(file))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"--checkpoint: {file} is no checkpoint that ComfyUI knows ({error})") from None
        if model is None or clip is None or vae is None:
            raise ValueError(
                f"--checkpoint: {file} lacks a model, text encoder or VAE: name a whole checkpoint"
            )
        return cls(model, clip, vae), Setting()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case as the model takes it.

    latent: of the source.
    mask: white in the edit region, or None.
    """

    case: Case
    picture: Image.Image
    latent: torch.Tensor
    mask: Image.Image | None
    source: list[Any]
    edit: list[Any]
    negative: list[Any]
    tokens: EditTokens


@contextmanager
def named(case: Case) -> Generator[None]:
    """Puts the case in front of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"case {case.id} ({case.origin}): {error}") from None


def fitted(case: Case, side: int) -> Case:
    """The case with all its pictures in one size: at most `side` pixels long, in whole latent cells."""
    picture = case.source()
    scale = min(1.0, side / max(picture.size))
    width, height = (max(CELL, int(scale * length) // CELL * CELL) for length in picture.size)

    def fit(role: str) -> Picture | None:
        found = case.read(role)
        if found is None:
            return None
        resized = ImageOps.fit(found, (width, height), Image.Resampling.LANCZOS)
        return Picture(role, lambda: resized)

    return replace(case, **{role: fit(role) for role in PICTURES})


class Calibration:
    """Edits with settings on cases, kept and measured as in a benchmark.

    text, structure: the metrics that judge.
    """

    def __init__(
        self, checkpoint: Checkpoint, cases: Sequence[Case], scorer: Scorer, results: Results, side: int
    ) -> None:
        self._checkpoint, self._scorer, self.results = checkpoint, scorer, results
        self.cases = [self._prepare(case, side) for case in cases]
        self.text = "clip_t" if scorer.judges_text else "own_text"
        self._dino = scorer.networks.get("structure_distance")
        self.structure = "own_structure" if self._dino is None else "dino_structure"
        sources = [self._judge(one, one.picture) for one in self.cases]
        self._source_text = sum(metrics[self.text] for metrics in sources) / len(sources)

    @torch.inference_mode()
    def _prepare(self, case: Case, side: int) -> Prepared:
        case, clip = fitted(case, side), self._checkpoint.clip
        picture, mask = case.source(), case.read("mask")
        texts = (case.source_description, case.edit_description, "")
        with named(case):
            tokens = find_tokens(clip, *texts[:2])
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
        latent = self._checkpoint.vae.encode(to_tensor(picture))
        return Prepared(case, picture, latent, mask, *encoded, tokens)

    @torch.inference_mode()
    def _judge(self, one: Prepared, edited: Image.Image) -> dict[str, Any]:
        """The benchmark's metrics and those that judge: of the structure only what is outside the mask, where
        there is one.
        """
        model, vae, mask = self._checkpoint.model, self._checkpoint.vae, one.mask
        outside = edited if mask is None else Image.composite(one.picture, edited, mask)
        before, after = to_tensor(one.picture), to_tensor(outside)
        if self._dino is not None:
            change = float(self._dino(after, before))
        else:
            maps = (structure_maps(model, vae.encode(picture), one.edit) for picture in (before, after))
            change = structure_change(*maps)
        metrics = {**self._scorer.measure(one.case, edited), self.structure: change}
        if self.text not in metrics:
            metrics[self.text] = text_fit(model, vae.encode(to_tensor(edited)), one.source, one.edit)
        return metrics

    @torch.inference_mode()
    def edited(self, setting: Setting, one: Prepared) -> Image.Image:
        """The edit of one case, as the node UnifyEdit makes it."""
        latent, _, _ = edit_latent(
            self._checkpoint.model,
            one.latent,
            None,
            source=one.source,
            edit=one.edit,
            negative=one.negative,
            edit_tokens=one.tokens,
            mask=None if one.mask is None else to_tensor(one.mask)[..., 0],
            scheduler="normal",
            options=UnifyOptions(),
            **asdict(setting),
        )
        return to_image(self._checkpoint.vae.decode(latent)[0])

    def of(self, setting: Setting) -> list[Result]:
        """The results of a setting; its missing edits are made."""
        known = {one.case.id: one for one in self.cases}
        for _, case in self.results.missing([setting], [one.case for one in self.cases]):
            start = time.perf_counter()
            with named(case):
                picture = self.edited(setting, known[case.id])
            seconds = time.perf_counter() - start
            save_picture(self.results.folder, setting.label, case.id, picture)
            metrics = self._judge(known[case.id], picture)
            self.results.append(new_result(setting, case, seconds, metrics))
        return [r for r in self.results.all if r["method"] == setting.label and r["case"] in known]

    def judged(self, setting: Setting) -> tuple[float, float]:
        """How much of the edit is made, above what the source shows, and how much the structure changes."""
        results = self.of(setting)
        return mean(results, self.text) - self._source_text, mean(results, self.structure)


def search(
    calibration: Calibration, start: Setting, grid: Mapping[str, Sequence[float]]
) -> dict[Setting, float]:
    """The tried settings with their scores, the best first.

    Raises ValueError if the judge sees no edit even without the losses.
    """
    free = calibration.judged(replace(start, denoise=1.0, structure=0.0, words=0.0))
    if free[0] <= 0 or free[1] <= 0:
        raise ValueError(
            f"{calibration.text} sees no edit even from full noise without the losses: do the descriptions "
            "fit the pictures, and does this checkpoint know what they name?"
        )
    scores: dict[Setting, float] = {}

    def score(setting: Setting) -> float:
        if setting not in scores:
            made, changed = calibration.judged(setting)
            scores[setting] = made / free[0] - changed / free[1]
            print(f"{scores[setting]:7.3f}  {setting.label}", flush=True)
        return scores[setting]

    best = start
    for name, values in grid.items():
        tried = [best, *(replace(best, **{name: value}) for value in values)]
        best = max(tried, key=score)
    return dict(sorted(scores.items(), key=lambda pair: pair[1], reverse=True))


def write(calibration: Calibration, start: Setting, scores: Mapping[Setting, float]) -> str:
    """Write the table, the contact sheet and the settings; returns the table."""
    folder, best = calibration.results.folder, next(iter(scores))
    names = (*asdict(best), "score", calibration.text, calibration.structure)
    rows = []
    for setting, score in scores.items():
        results = calibration.of(setting)
        values = [*asdict(setting).values(), score]
        values += [mean(results, name) for name in (calibration.text, calibration.structure)]
        rows.append([f"{value:.3g}" for value in values])
    table = markdown(names, rows)
    write_bytes(folder / "settings.md", f"{table}\n".encode())
    write_json(folder / "settings.json", asdict(best))
    shown = calibration.cases[:SHOWN]
    columns: list[tuple[str, Any]] = [("source", [to_tensor(one.picture)[0] for one in shown])]
    for title, setting in (("at the start", start), ("chosen", best)):
        files = [picture_file(folder, setting.label, one.case.id) for one in shown]
        columns.append((f"{title}: {setting.label}", [to_tensor(Image.open(file))[0] for file in files]))
    captions = [[one.case.source_description, "", one.case.edit_description] for one in shown]
    save_image(to_image(draw_sheet(columns, 256, captions)[0]), folder / "sheet.jpg")
    return table


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dev.py calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="SD1.x, SD2.x or SDXL")
    add("--pairs", type=Path, required=True, metavar="DIR", help="a benchmark folder")
    add("--out", type=Path, default=Path("output/calibrate"), help="where to write (output/calibrate)")
    add("--steps", type=int, help="of the inversion and of the sampling (50)")
    add("--side", type=int, default=512, help="longer side of the pictures at most (512; SDXL: 1024)")
    add("--clip-vision", type=Path, metavar="FILE", help="image half of a CLIP, to judge the edit")
    add("--clip", type=Path, metavar="FILE", help="text half of the same CLIP")
    add("--json", type=Path, metavar="FILE", help="write the chosen settings and their score")
    return found


def run(options: argparse.Namespace) -> dict[str, float]:
    """Search and write; returns the chosen settings and their score."""
    if not options.checkpoint.is_file():
        raise ValueError(f"--checkpoint: there is no file {options.checkpoint}")
    cases = read_cases("folder", options.pairs, "")
    where = {
        "layout": "folder",
        "folder": str(options.pairs.resolve()),
        "split": "",
        "checkpoint": [options.checkpoint.name, options.checkpoint.stat().st_size],
        "side": options.side,
    }
    scorer = Scorer(options.clip_vision, options.clip)
    settings = check_run(options.out, where, [])
    checkpoint, start = Checkpoint.load(options.checkpoint)
    start = replace(start, steps=options.steps or start.steps)
    calibration = Calibration(checkpoint, cases, scorer, Results(options.out), options.side)
    write_run(options.out, {**settings, "missing": scorer.missing})
    print(f"{len(cases)} cases; judged by {calibration.text} and {calibration.structure}", flush=True)
    scores = search(calibration, start, GRID)
    print(write(calibration, start, scores))
    write_report(options.out)
    best, score = next(iter(scores.items()))
    print(f"type into UnifyEdit: {best.label}\n{options.out / 'sheet.jpg'}\n{options.out / 'report.html'}")
    return {**asdict(best), "score": score, "score_at_the_start": scores[start]}


def main(arguments: Sequence[str]) -> int:
    """0, or 2 for input that cannot be used."""
    options = parser().parse_args(arguments)
    comfy.utils.set_progress_bar_enabled(False)
    try:
        write_json(options.json, run(options))
    except (ValueError, CaseError) as problem:
        print(f"dev.py calibrate: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
