"""`python dev.py unify-study`: UnifyEdit and its parts on 300 held-out edits, against baselines.

Settings were chosen on the tuning cases (`--tune` prints that search). Results are kept, so a stopped study
continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from ..benchmark.cases import Case, first_of_each_type
from ..benchmark.layouts import read_cases
from ..benchmark.results import Result
from ..benchmark.statistics import mean
from ..output import markdown
from . import bridge_study
from .balances import CHOSEN, DECAYS, drawn
from .methods import Edit, injected, unify
from .studio import Batch, Studio, StudioMethod, quick_products
from .study import Plan, Rows, Study, command

COLUMNS = ("success", "target_psnr", "psnr_outside", "ssim_outside", "structure")
TUNING_PER_TYPE = 8  # even, so that the wordings alternate throughout
TIMED = 4  # edits
Edits = Mapping[str, Edit]  # by edit type
# Chosen on the tuning cases.
EDIT = Edit(denoise=0.6, cfg=2.0, masked=True, structure_region="outside")
PRESET_EDITS: Edits = {edit_type: replace(EDIT, balance=CHOSEN[edit_type]) for edit_type in scenes.EDIT_TYPES}
ALL_LEVELS: Edits = {edit_type: replace(edit, denoise=1.0) for edit_type, edit in PRESET_EDITS.items()}
# An earlier choice, with which more rows were measured: fewer noise levels, more text guidance, and a higher
# weight of the words.
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


def edited(edits: Edits, **values: Any) -> StudioMethod:
    """UnifyEdit with `edits` and some settings replaced."""
    return unify({edit_type: replace(edit, **values) for edit_type, edit in edits.items()})


def balanced(edits: Edits, change: Callable[[Balance], Balance]) -> StudioMethod:
    """UnifyEdit with `edits` and a change of their balances."""
    return unify({kind: replace(edit, balance=change(edit.balance)) for kind, edit in edits.items()})


def losses(edits: Edits) -> Rows:
    """Both losses, each of them alone, and neither."""
    return {
        "both": unify(edits),
        "SAP only": balanced(edits, lambda balance: replace(balance, beta2=0.0)),
        "CAA only": balanced(edits, lambda balance: replace(balance, beta1=0.0)),
        "neither": balanced(edits, lambda balance: replace(balance, beta1=0.0, beta2=0.0)),
    }


def injection(fractions: tuple[float, float]) -> Rows:
    label = f"attention injection, {fractions[0]:g} and {fractions[1]:g}"
    return {label: injected(3.0, *fractions)}


def tables() -> dict[str, Rows]:
    """The rows of the tables, by the name that the page gives them."""
    lower = unify(LOWER_LEVELS)
    factors = {"as chosen": lower}
    for symbol, name in (("β1", "beta1"), ("β2", "beta2"), ("k1", "k1"), ("k2", "k2")):
        for word, factor in (("half", 0.5), ("double", 2.0)):
            factors[f"{symbol} {word}"] = balanced(LOWER_LEVELS, partial(_scaled, name, factor))
    combinations, curves = {"balanced": lower}, {"exponential": lower}
    for combination in ("norm", "naive"):
        combinations[combination] = balanced(LOWER_LEVELS, partial(replace, combination=combination))
    for decay in DECAYS:
        curves[decay] = balanced(LOWER_LEVELS, partial(_drawn, decay))
    text, image, inversion = bridge_study.baselines().items()
    return {
        "methods": {
            "UnifyEdit": unify(PRESET_EDITS),
            "UnifyEdit without a mask": edited(PRESET_EDITS, masked=False, structure_region="everywhere"),
            "UnifyEdit, denoise 0.4": lower,
            **dict([image, inversion]),
            **injection(INJECTION),
            **dict([text]),
        },
        "losses": losses(PRESET_EDITS),
        "wide_losses": losses(ALL_LEVELS),
        "lower_losses": losses(LOWER_LEVELS),
        "lower_combinations": combinations,
        "lower_ways": {"latent": lower, "noise": edited(LOWER_LEVELS, update_target="noise")},
        "lower_curves": curves,
        "lower_factors": factors,
        "lower_inversions": {"ddim": lower, "virtual": edited(LOWER_LEVELS, mode="virtual")},
    }


def _drawn(decay: str, balance: Balance) -> Balance:
    return replace(balance, drawn=drawn(balance, decay))


def _scaled(name: str, factor: float, balance: Balance) -> Balance:
    return replace(balance, **{name: factor * getattr(balance, name)})


def metrics(study: Study, rows: Mapping[str, Rows]) -> dict[str, float]:
    """The numbers for machines."""
    whole, without, _, *baselines = rows["methods"].values()
    found = {
        "success": study.mean(whole),
        "success_worst_type": study.worst_type(whole),
        "success_without_mask": study.mean(without),
        "success_best_baseline": max(map(study.mean, baselines)),
        "kept_db": study.mean(whole, "psnr_outside"),
        "kept_db_best_baseline": max(study.mean(other, "psnr_outside") for other in baselines),
    }
    others = {
        "success_lower_naive": ("lower_combinations", "naive"),
        "success_lower_norm": ("lower_combinations", "norm"),
        "success_lower_balanced": ("lower_combinations", "balanced"),
        "success_sap_only": ("losses", "SAP only"),
        "success_caa_only": ("losses", "CAA only"),
        "success_neither": ("losses", "neither"),
        "success_all_levels": ("wide_losses", "both"),
        "success_all_levels_sap_only": ("wide_losses", "SAP only"),
        "success_all_levels_caa_only": ("wide_losses", "CAA only"),
        "success_all_levels_neither": ("wide_losses", "neither"),
        "success_lower_latent": ("lower_ways", "latent"),
        "success_lower_noise": ("lower_ways", "noise"),
    }
    return found | {name: study.mean(rows[table][label]) for name, (table, label) in others.items()}


def texts(study: Study, rows: Mapping[str, Rows], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The page's values beside the tables."""
    times = seconds(study.tiny, rows["methods"])
    return {
        "tuning": TUNING_PER_TYPE,
        "times": markdown(["method", "CPU seconds an edit"], [[k, f"{v:.2f}"] for k, v in times.items()]),
        "presets": preset_table(),
        "edit": EDIT,
    }


def seconds(tiny: Studio, rows: Rows) -> dict[str, float]:
    """CPU seconds of an edit with each method, without decoding."""
    cases = first_of_each_type(read_cases("tiny-studio", None, "tuning"), 1)[:TIMED]
    batch, found = Batch.of(tiny, cases), {}
    for label, method in rows.items():
        start = time.process_time()
        with torch.inference_mode(), quick_products(tiny):
            method.edit(tiny, batch)
        found[label] = (time.process_time() - start) / TIMED
    return found


def preset_table() -> str:
    """The chosen balances as a Markdown table."""
    names = ("combination", "beta1", "k1", "beta2", "k2")
    rows = [[name, *(f"{getattr(balance, key)}" for key in names)] for name, balance in CHOSEN.items()]
    return markdown(["edit type", *names], rows)


def searched() -> tuple[Rows, Rows]:
    """The search, with one setting for all types: ways to run UnifyEdit, and balances."""

    def every(edit: Edit) -> StudioMethod:
        return unify(dict.fromkeys(scenes.EDIT_TYPES, edit))

    wide = replace(EDIT, denoise=1.0)
    neither = Balance(beta1=0.0, beta2=0.0)
    ways = {
        "denoise 0.6, CFG 2, mask, structure kept outside": every(EDIT),
        "neither loss": every(replace(EDIT, balance=neither)),
        "denoise 1": every(wide),
        "denoise 1, 20 steps": every(replace(wide, steps=20)),
        "denoise 1, no mask": every(replace(wide, masked=False, structure_region="everywhere")),
        "denoise 1, neither loss": every(replace(wide, balance=neither)),
        "denoise 0.4, CFG 3, heavier words": every(LOWER_LEVELS["colour"]),
        **injection((0.2, 0.4)),
        **injection((0.4, 0.8)),
    }
    wider = [(2.0, 1.0, 1.0, beta2) for beta2 in (0.1, 0.0)]
    wider += [(3.0, *values) for values in ((1.0, 1.0, 0.0), (0.7, 0.5, 0.0), (0.5, 0.5, 0.0))]
    wider += [(3.0, beta1, 0.0, beta2) for beta1, beta2 in ((0.5, 0.0), (0.5, 0.1), (0.5, 0.3), (0.3, 0.0))]
    balances = {"denoise 0.6, β2 0.1": every(replace(EDIT, balance=Balance(beta2=0.1)))}
    for cfg, beta1, k1, beta2 in wider:
        label = f"denoise 1, CFG {cfg:g}, β1 {beta1:g}, k1 {k1:g}, β2 {beta2:g}"
        balances[label] = every(replace(wide, cfg=cfg, balance=Balance(beta1=beta1, k1=k1, beta2=beta2)))
    return ways, balances


def success_by_wording(cases: Sequence[Case], rows: Mapping[str, Sequence[Result]]) -> str:
    """A Markdown table of the success of results by label, for each edit type and wording."""
    kinds = {case.id: f"{case.edit_type}, {scenes.WORDINGS[number % 2]}" for number, case in enumerate(cases)}
    heads = [f"{edit_type}, {wording}" for edit_type in scenes.EDIT_TYPES for wording in scenes.WORDINGS]
    lines = []
    for label, results in rows.items():
        parts = ([result for result in results if kinds[result["case"]] == kind] for kind in heads)
        lines.append([label, *(f"{mean(part, 'success'):.0%}" for part in parts)])
    return markdown(["", *heads], lines)


def tune(study: Study) -> None:
    """The search on the tuning cases."""
    ways, balances = searched()
    study.run(ways.values())
    print(study.table(ways, COLUMNS), flush=True)
    study.run(balances.values())
    results = {label: study.of(method) for label, method in balances.items()}
    print(study.table(balances, COLUMNS), success_by_wording(study.cases, results), sep="\n\n")


PLAN = Plan("unify_study", COLUMNS, tables, metrics, texts, tune, shown=6)

if __name__ == "__main__":
    command("dev.py unify-study", __doc__, PLAN, TUNING_PER_TYPE)
