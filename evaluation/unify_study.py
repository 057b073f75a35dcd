"""`python dev.py unify-study`: what UnifyEdit does on 300 held-out edits of the Tiny Studio, part by
part, against what one does without it.

Settings were chosen on the tuning cases (`--tune` shows that search). The pictures of the cases are kept, so
that a study that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..models.tiny_studio import scenes
from ..patches.unify_balance import Balance
from ..patches.unify_presets import PRESETS
from .bridge_study import image_row, inverted_row, text_row
from .study import Row, Study, command, contact_sheet, table
from .tiny_benchmark import Cases, Scores, Studio, draw_cases, structure_distance
from .unify_methods import Edit, injected, unified_by_type

ROOT = Path(__file__).resolve().parent.parent
PAGE, PAGE_TEXT = ROOT / "docs" / "unify_study.md", Path(__file__).with_name("unify_study_page.md")
PICTURE = ROOT / "docs" / "pictures" / "unify_study.jpg"
COLUMNS = ("success", "psnr_db", "kept_db", "kept_ssim", "structure")
TUNING_A_TYPE = 24  # even, so that the wordings alternate throughout
TIMED = 4  # edits
# Chosen on the tuning cases.
EDIT = Edit(denoise=0.4, masked=True, keep="outside")
INJECTION = (0.2, 0.4)


def preset_edits(change: Callable[[Edit], Edit] = lambda edit: edit) -> dict[str, Edit]:
    """The settings of each edit type, each with one `change`."""
    return {
        edit_type: change(replace(EDIT, balance=PRESETS[f"{edit_type}, complex"]))
        for edit_type in scenes.EDIT_TYPES
    }


def unify_row(label: str, change: Callable[[Edit], Edit] = lambda edit: edit) -> Row:
    edits = preset_edits(change)
    return Row(label, partial(unified_by_type, edits=edits), f"unify {sorted(edits.items())}")


def balance_row(label: str, **values: Any) -> Row:
    """The presets with some values of the balance put in place."""
    return unify_row(label, lambda edit: replace(edit, balance=replace(edit.balance, **values)))


def scaled_row(label: str, **factors: float) -> Row:
    """The presets with some values of the balance multiplied."""

    def change(edit: Edit) -> Edit:
        values = {name: factor * getattr(edit.balance, name) for name, factor in factors.items()}
        return replace(edit, balance=replace(edit.balance, **values))

    return unify_row(label, change)


def edit_row(label: str, **values: Any) -> Row:
    """The presets with some other settings put in place."""
    return unify_row(label, lambda edit: replace(edit, **values))


def injection_row(self_share: float, cross_share: float) -> Row:
    method = partial(injected, cfg=3.0, self_share=self_share, cross_share=cross_share)
    label = f"attention injection, {self_share:g} and {cross_share:g}"
    return Row(label, method, f"injected 3 {self_share} {cross_share}")


def tables() -> dict[str, list[Row]]:
    """The rows of the tables, by the name that the page gives them."""
    whole = unify_row("UnifyEdit")
    return {
        "methods": [
            whole,
            edit_row("UnifyEdit without a mask", masked=False, keep="everywhere"),
            image_row(),
            inverted_row(),
            injection_row(*INJECTION),
            text_row(),
        ],
        "combinations": [
            replace(whole, label="balanced"),
            balance_row("norm", combination="norm"),
            balance_row("naive", combination="naive"),
        ],
        "losses": [
            replace(whole, label="both"),
            balance_row("SAP only", beta2=0.0),
            balance_row("CAA only", beta1=0.0),
            balance_row("neither", beta1=0.0, beta2=0.0),
        ],
        "ways": [replace(whole, label="latent"), edit_row("noise", method="noise")],
        "curves": [
            replace(whole, label="exponential"),
            balance_row("linear", curve="linear"),
            balance_row("cosine", curve="cosine"),
        ],
        "factors": [
            replace(whole, label="as chosen"),
            scaled_row("β1 half", beta1=0.5),
            scaled_row("β1 double", beta1=2.0),
            scaled_row("β2 half", beta2=0.5),
            scaled_row("β2 double", beta2=2.0),
            scaled_row("k1 half", k1=0.5),
            scaled_row("k1 double", k1=2.0),
            scaled_row("k2 half", k2=0.5),
            scaled_row("k2 double", k2=2.0),
        ],
        "inversions": [replace(whole, label="ddim"), edit_row("virtual", mode="virtual")],
    }


def seconds(tiny: Studio, rows: list[Row]) -> dict[str, float]:
    """The processor's seconds that an edit takes with each row's method."""
    cases = draw_cases(tiny, held_out=False, a_type=1).chosen(list(range(TIMED)))
    found = {}
    for row in rows:
        start = time.process_time()
        with torch.inference_mode(), torch.autocast(cases.latent.device.type, torch.bfloat16):
            row.method(tiny, cases)
        found[row.label] = (time.process_time() - start) / TIMED
    return found


def scores_of(study: Study, rows: list[Row]) -> dict[str, Scores]:
    """Each row's scores by its label, the structure distance among them."""
    found = {}
    for row in rows:
        structure = structure_distance(study.tiny, study.cases, study.pictures(row))
        found[row.label] = replace(study.scores(row), structure=structure)
    return found


def measure(study: Study) -> tuple[dict[str, float], str]:
    """The figures, and the page with all tables; draws the page's picture."""
    rows = tables()
    scores = {name: scores_of(study, some) for name, some in rows.items()}
    methods = scores["methods"]
    whole, without, *baselines = methods.values()
    combinations, losses, ways = (scores[name] for name in ("combinations", "losses", "ways"))
    figures = {
        "success": whole.mean("success"),
        "success_worst_type": whole.worst_type(),
        "success_without_mask": without.mean("success"),
        "success_best_baseline": max(other.mean("success") for other in baselines),
        "kept_db": whole.mean("kept_db"),
        "kept_db_best_baseline": max(other.mean("kept_db") for other in baselines),
        "success_naive": combinations["naive"].mean("success"),
        "success_norm": combinations["norm"].mean("success"),
        "success_balanced": combinations["balanced"].mean("success"),
        "success_sap_only": losses["SAP only"].mean("success"),
        "success_caa_only": losses["CAA only"].mean("success"),
        "success_latent": ways["latent"].mean("success"),
        "success_noise": ways["noise"].mean("success"),
    }
    shown = {row.label: (study.pictures(row), methods[row.label].success) for row in rows["methods"][:5]}
    contact_sheet(study.cases, shown, 2, PICTURE)
    page = PAGE_TEXT.read_text(encoding="utf-8").format(
        cases=len(study.cases),
        tuning=TUNING_A_TYPE,
        times=_time_table(seconds(study.tiny, rows["methods"])),
        presets=preset_table(),
        edit=EDIT,
        **{name: table(found, by_type=True, columns=COLUMNS) for name, found in scores.items()},
    )
    return figures, page


def _time_table(times: Mapping[str, float]) -> str:
    lines = ["| method | CPU seconds an edit |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {label} | {value:.2f} |" for label, value in times.items())])


def preset_table() -> str:
    """The presets as a Markdown table."""
    names = ("combination", "beta1", "k1", "beta2", "k2", "curve")
    lines = [["preset", *names], ["---"] * 7]
    lines += [[name, *(f"{getattr(preset, key)}" for key in names)] for name, preset in PRESETS.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def searched() -> tuple[list[Row], list[Row]]:
    """What the search looked at, with one setting for all types: ways to run it, and balances."""

    def row(label: str, edit: Edit) -> Row:
        edits = dict.fromkeys(scenes.EDIT_TYPES, edit)
        return Row(label, partial(unified_by_type, edits=edits), f"unify all {edit}")

    ways = [
        row("denoise 0.4, CFG 3, mask, structure kept outside", EDIT),
        row("denoise 0.3", replace(EDIT, denoise=0.3)),
        row("denoise 0.6", replace(EDIT, denoise=0.6)),
        row("structure kept everywhere", replace(EDIT, keep="everywhere")),
        row("no mask", replace(EDIT, masked=False, keep="everywhere")),
        row("latent moved inside the mask only", replace(EDIT, mask_update=True)),
        row("virtual inversion", replace(EDIT, mode="virtual")),
        row("CFG 1", replace(EDIT, cfg=1.0)),
        row("words at 4x4 in place of 16x16", replace(EDIT, word_side=4)),
        row("all noise levels, 25 steps, no mask", Edit(steps=25)),
        row("the same, CAA only", Edit(Balance(beta1=0.0), steps=25)),
        *(injection_row(*shares) for shares in ((0.2, 0.4), (0.4, 0.8))),
    ]
    factors = ((1.0, 1.0), (3.0, 1.0), (0.3, 1.0), (0.1, 1.0), (1.0, 3.0), (1.0, 0.3), (0.1, 0.3))
    balances = [
        row(f"β1 {beta1:g}, β2 {beta2:g}", replace(EDIT, balance=Balance(beta1=beta1, beta2=beta2)))
        for beta1, beta2 in factors
    ]
    return ways, balances


def preset_success(cases: Cases, scores: Mapping[str, Scores]) -> str:
    """A Markdown table of each row's success by preset, that is by edit type and wording."""
    kinds = tuple(
        f"{pair.edit_type}, {scenes.WORDINGS[number % 2]}" for number, pair in enumerate(cases.pairs)
    )
    lines = [["", *PRESETS], ["---"] * (len(PRESETS) + 1)]
    for label, found in scores.items():
        by_preset = replace(found, types=kinds)
        lines.append([label, *(f"{by_preset.mean('success', preset):.0%}" for preset in PRESETS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tune(study: Study) -> None:
    """The search on the tuning cases."""
    ways, balances = searched()
    print(table(scores_of(study, ways), True, COLUMNS), flush=True)
    found = scores_of(study, balances)
    print(table(found, True, COLUMNS), preset_success(study.cases, found), sep="\n\n")


if __name__ == "__main__":
    command("dev.py unify-study", __doc__, PAGE, measure, tune, TUNING_A_TYPE)
