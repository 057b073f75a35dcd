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

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from ...patches.unify.presets import PRESETS
from .bridge_study import image_row, inverted_row, text_row
from .study import Row, Study, command, contact_sheet, table
from .tiny_benchmark import Cases, Scores, Studio, draw_cases, quick_products, structure_distance
from .unify_methods import Edit, injected, unified_by_type

ROOT = Path(__file__).resolve().parents[2]
PAGE, PAGE_TEXT = ROOT / "docs" / "unify_study.md", Path(__file__).with_name("unify_study_page.md")
PICTURE = ROOT / "docs" / "pictures" / "unify_study.jpg"
COLUMNS = ("success", "psnr_db", "kept_db", "kept_ssim", "structure")
TUNING_A_TYPE = 8  # even, so that the wordings alternate throughout
TIMED = 4  # edits
Edits = Mapping[str, Edit]  # by edit type
# Chosen on the tuning cases.
EDIT = Edit(denoise=0.6, cfg=2.0, masked=True, keep="outside")
PRESET_EDITS: Edits = {
    edit_type: replace(EDIT, balance=PRESETS[f"{edit_type}, complex"]) for edit_type in scenes.EDIT_TYPES
}
ALL_LEVELS: Edits = {edit_type: replace(edit, denoise=1.0) for edit_type, edit in PRESET_EDITS.items()}
# An earlier choice, of which more rows were measured: fewer noise levels, more guidance by text, and a
# heavier weight of the words.
LOWER_LEVELS: Edits = {
    edit_type: replace(
        EDIT,
        denoise=0.4,
        cfg=3.0,
        balance=Balance(beta1=0.1 if edit_type == "style" else 1.0, k1=2.0, beta2=1.0, k2=2.0),
    )
    for edit_type in scenes.EDIT_TYPES
}
INJECTION = (0.2, 0.4)


def unify_row(label: str, edits: Edits, change: Callable[[Edit], Edit] = lambda edit: edit) -> Row:
    """`edits`, each with one `change`."""
    edits = {edit_type: change(edit) for edit_type, edit in edits.items()}
    return Row(label, partial(unified_by_type, edits=edits), f"unify {sorted(edits.items())}")


def balance_row(label: str, edits: Edits, **values: Any) -> Row:
    """`edits` with some values of the balance put in place."""
    return unify_row(label, edits, lambda edit: replace(edit, balance=replace(edit.balance, **values)))


def scaled_row(label: str, edits: Edits, **factors: float) -> Row:
    """`edits` with some values of the balance multiplied."""

    def change(edit: Edit) -> Edit:
        values = {name: factor * getattr(edit.balance, name) for name, factor in factors.items()}
        return replace(edit, balance=replace(edit.balance, **values))

    return unify_row(label, edits, change)


def edit_row(label: str, edits: Edits, **values: Any) -> Row:
    """`edits` with some other settings put in place."""
    return unify_row(label, edits, lambda edit: replace(edit, **values))


def injection_row(self_share: float, cross_share: float) -> Row:
    method = partial(injected, cfg=3.0, self_share=self_share, cross_share=cross_share)
    label = f"attention injection, {self_share:g} and {cross_share:g}"
    return Row(label, method, f"injected 3 {self_share} {cross_share}")


def tables() -> dict[str, list[Row]]:
    """The rows of the tables, by the name that the page gives them."""
    whole, lower_whole = unify_row("UnifyEdit", PRESET_EDITS), unify_row("both", LOWER_LEVELS)
    balanced, lower = (partial(balance_row, edits=edits) for edits in (PRESET_EDITS, LOWER_LEVELS))
    over_all, scaled = partial(balance_row, edits=ALL_LEVELS), partial(scaled_row, edits=LOWER_LEVELS)
    return {
        "methods": [
            whole,
            edit_row("UnifyEdit without a mask", PRESET_EDITS, masked=False, keep="everywhere"),
            replace(lower_whole, label="UnifyEdit, denoise 0.4"),
            image_row(),
            inverted_row(),
            injection_row(*INJECTION),
            text_row(),
        ],
        "losses": [
            replace(whole, label="both"),
            balanced("SAP only", beta2=0.0),
            balanced("CAA only", beta1=0.0),
            balanced("neither", beta1=0.0, beta2=0.0),
        ],
        "wide_losses": [
            over_all("both"),
            over_all("SAP only", beta2=0.0),
            over_all("CAA only", beta1=0.0),
            over_all("neither", beta1=0.0, beta2=0.0),
        ],
        "lower_losses": [
            lower_whole,
            lower("SAP only", beta2=0.0),
            lower("CAA only", beta1=0.0),
            lower("neither", beta1=0.0, beta2=0.0),
        ],
        "lower_combinations": [
            replace(lower_whole, label="balanced"),
            lower("norm", combination="norm"),
            lower("naive", combination="naive"),
        ],
        "lower_ways": [replace(lower_whole, label="latent"), edit_row("noise", LOWER_LEVELS, method="noise")],
        "lower_curves": [
            replace(lower_whole, label="exponential"),
            lower("linear", curve="linear"),
            lower("cosine", curve="cosine"),
        ],
        "lower_factors": [
            replace(lower_whole, label="as chosen"),
            scaled("β1 half", beta1=0.5),
            scaled("β1 double", beta1=2.0),
            scaled("β2 half", beta2=0.5),
            scaled("β2 double", beta2=2.0),
            scaled("k1 half", k1=0.5),
            scaled("k1 double", k1=2.0),
            scaled("k2 half", k2=0.5),
            scaled("k2 double", k2=2.0),
        ],
        "lower_inversions": [
            replace(lower_whole, label="ddim"),
            edit_row("virtual", LOWER_LEVELS, mode="virtual"),
        ],
    }


def seconds(tiny: Studio, rows: list[Row]) -> dict[str, float]:
    """The processor's seconds that an edit takes with each row's method."""
    cases = draw_cases(tiny, held_out=False, a_type=1).chosen(list(range(TIMED)))
    found = {}
    for row in rows:
        start = time.process_time()
        with torch.inference_mode(), quick_products(tiny):
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
    whole, without, _, *baselines = methods.values()
    losses, wide, combinations, ways = (
        scores[name] for name in ("losses", "wide_losses", "lower_combinations", "lower_ways")
    )
    figures = {
        "success": whole.mean("success"),
        "success_worst_type": whole.worst_type(),
        "success_without_mask": without.mean("success"),
        "success_best_baseline": max(other.mean("success") for other in baselines),
        "kept_db": whole.mean("kept_db"),
        "kept_db_best_baseline": max(other.mean("kept_db") for other in baselines),
        "success_lower_naive": combinations["naive"].mean("success"),
        "success_lower_norm": combinations["norm"].mean("success"),
        "success_lower_balanced": combinations["balanced"].mean("success"),
        "success_sap_only": losses["SAP only"].mean("success"),
        "success_caa_only": losses["CAA only"].mean("success"),
        "success_neither": losses["neither"].mean("success"),
        "success_all_levels": wide["both"].mean("success"),
        "success_all_levels_sap_only": wide["SAP only"].mean("success"),
        "success_all_levels_caa_only": wide["CAA only"].mean("success"),
        "success_all_levels_neither": wide["neither"].mean("success"),
        "success_lower_latent": ways["latent"].mean("success"),
        "success_lower_noise": ways["noise"].mean("success"),
    }
    shown = {row.label: (study.pictures(row), methods[row.label].success) for row in rows["methods"][:6]}
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

    wide = replace(EDIT, denoise=1.0)
    neither = Balance(beta1=0.0, beta2=0.0)
    ways = [
        row("denoise 0.6, CFG 2, mask, structure kept outside", EDIT),
        row("neither loss", replace(EDIT, balance=neither)),
        row("denoise 1", wide),
        row("denoise 1, 20 steps", replace(wide, steps=20)),
        row("denoise 1, no mask", replace(wide, masked=False, keep="everywhere")),
        row("denoise 1, neither loss", replace(wide, balance=neither)),
        row("denoise 0.4, CFG 3, heavier words", LOWER_LEVELS["colour"]),
        *(injection_row(*shares) for shares in ((0.2, 0.4), (0.4, 0.8))),
    ]
    wider = [(2.0, 1.0, 1.0, beta2) for beta2 in (0.1, 0.0)]
    wider += [(3.0, *values) for values in ((1.0, 1.0, 0.0), (0.7, 0.5, 0.0), (0.5, 0.5, 0.0))]
    wider += [(3.0, beta1, 0.0, beta2) for beta1, beta2 in ((0.5, 0.0), (0.5, 0.1), (0.5, 0.3), (0.3, 0.0))]
    balances = [row("denoise 0.6, β2 0.1", replace(EDIT, balance=Balance(beta2=0.1)))]
    balances += [
        row(
            f"denoise 1, CFG {cfg:g}, β1 {beta1:g}, k1 {k1:g}, β2 {beta2:g}",
            replace(wide, cfg=cfg, balance=Balance(beta1=beta1, k1=k1, beta2=beta2)),
        )
        for cfg, beta1, k1, beta2 in wider
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
