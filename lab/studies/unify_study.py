"""`python dev.py unify-study`: UnifyEdit and its parts on 300 held-out edits, against baselines.

The page is written from stored rows; `--measure` first measures what is missing or of earlier weights.
Settings were chosen on the tuning cases, of one object and of two (`--tune` measures and prints that search).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from ..benchmark.statistics import mean
from ..output import markdown
from . import bridge_study, paper_settings, two_objects, word_search
from .balances import CHOSEN, DECAYS, drawn
from .claims import Aim, Claim, Comparison
from .methods import Edit, unify
from .publish import Plan, command
from .studio import StudioMethod
from .study import Rows, Study, Tables, best, cell

COLUMNS = ("success", "target_psnr", "psnr_outside", "ssim_outside", "structure", "seconds")
TUNING_PER_TYPE = 4  # even, so that the wordings alternate throughout
Edits = Mapping[str, Edit]  # by edit type
# Chosen on the tuning cases.
EDIT = Edit(denoise=0.6, cfg=2.0, masked=True, structure_region="outside")
PRESET_EDITS: Edits = {edit_type: replace(EDIT, balance=CHOSEN[edit_type]) for edit_type in scenes.EDIT_TYPES}
ALL_LEVELS: Edits = {edit_type: replace(edit, denoise=1.0) for edit_type, edit in PRESET_EDITS.items()}
# Fewer noise levels, more text guidance, and a higher weight of the words.
LOWER_LEVELS: Edits = {
    edit_type: replace(
        EDIT,
        denoise=0.4,
        cfg=3.0,
        balance=Balance(beta1=0.1 if edit_type == "style" else 1.0, k1=2.0, beta2=1.0, k2=2.0),
    )
    for edit_type in scenes.EDIT_TYPES
}


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


def combinations(edits: Edits) -> Rows:
    """The ways to combine the gradients."""
    found = {"balanced": unify(edits)}
    return found | {name: balanced(edits, partial(replace, combination=name)) for name in ("norm", "naive")}


def tables() -> dict[str, Rows]:
    """The rows of the tables, by the name that the page gives them."""
    whole, wide, lower = unify(PRESET_EDITS), unify(ALL_LEVELS), unify(LOWER_LEVELS)
    factors, curves = {"as chosen": whole}, {"exponential": whole}
    for symbol, name in (("β1", "beta1"), ("β2", "beta2"), ("k1", "k1"), ("k2", "k2")):
        for word, factor in (("half", 0.5), ("double", 2.0)):
            factors[f"{symbol} {word}"] = balanced(PRESET_EDITS, partial(_scaled, name, factor))
    for decay in DECAYS:
        curves[decay] = balanced(PRESET_EDITS, partial(_drawn, decay))
    text, image, inversion = bridge_study.baselines().items()
    return {
        "methods": {
            "UnifyEdit": whole,
            "UnifyEdit without a mask": edited(PRESET_EDITS, masked=False, structure_region="everywhere"),
            "UnifyEdit, denoise 0.4": lower,
            **dict([image, inversion]),
            **paper_settings.papers(),
            **dict([text]),
        },
        "wide_losses": losses(ALL_LEVELS),
        "losses": losses(PRESET_EDITS),
        "wide_combinations": combinations(ALL_LEVELS),
        "wide_ways": {"latent": wide, "noise": edited(ALL_LEVELS, update_target="noise")},
        "wide_inversions": {"ddim": wide, "virtual": edited(ALL_LEVELS, mode="virtual")},
        "lower_combinations": combinations(LOWER_LEVELS),
        "lower_ways": {"latent": lower, "noise": edited(LOWER_LEVELS, update_target="noise")},
        "factors": factors,
        "curves": curves,
    }


def _drawn(decay: str, balance: Balance) -> Balance:
    return replace(balance, drawn=drawn(balance, decay))


def _scaled(name: str, factor: float, balance: Balance) -> Balance:
    return replace(balance, **{name: factor * getattr(balance, name)})


def metrics(study: Study, tables: Tables) -> dict[str, float]:
    """The numbers for machines."""
    whole, without, _, *baselines = tables["methods"].values()
    found = {
        "success": study.mean(whole),
        "success_worst_type": study.worst_type(whole),
        "success_without_mask": study.mean(without),
        "success_best_baseline": best(map(study.mean, baselines)),
        "kept_db": study.mean(whole, "psnr_outside"),
        "kept_db_best_baseline": best(study.mean(other, "psnr_outside") for other in baselines),
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
    return found | {name: study.mean(tables[table][label]) for name, (table, label) in others.items()}


def claims(study: Study, tables: Tables) -> list[Claim]:
    """The paper's claims. It measures editability by CLIP, for which success stands in, and fidelity by a
    structure distance.
    """
    whole, _, _, *baselines = tables["methods"].items()
    both, structure, words, _ = tables["wide_losses"].items()
    balanced_, norm, naive = tables["wide_combinations"].items()
    latent, noise = tables["wide_ways"].items()
    ddim, virtual = tables["wide_inversions"].items()

    def all_metrics(first: Any, second: Any, *names: str) -> tuple[Comparison, ...]:
        return tuple(Comparison(name, first, second) for name in names)

    return [
        Claim(
            "Makes more edits than every other method without training",
            tuple(Comparison("success", whole, other) for other in baselines),
        ),
        Claim(
            "Keeps more structure than every other method without training",
            tuple(Comparison("structure", whole, other) for other in baselines),
        ),
        Claim("Both losses make more edits than SAP alone", all_metrics(both, structure, "success")),
        Claim("Both losses keep more than CAA alone", all_metrics(both, words, "structure", "psnr_outside")),
        Claim("Both losses make more edits than CAA alone", all_metrics(both, words, "success")),
        Claim("Balanced is better than norm", all_metrics(balanced_, norm, "success", "structure")),
        Claim("Norm is better than naive", all_metrics(norm, naive, "success", "structure")),
        Claim("Naive gives up the structure", all_metrics(balanced_, naive, "structure", "psnr_outside")),
        Claim(
            "Optimising the latent is better than guiding the noise",
            all_metrics(latent, noise, "success", "structure", "psnr_outside"),
        ),
        Claim(
            "Works with a DDIM inversion too (no worse than virtual)",
            (Comparison("success", ddim, virtual, 0.05),),
        ),
        Claim(
            "Users prefer it to every other method", (), "a study with people; its figures are in a picture"
        ),
    ]


def aims(study: Study, tables: Tables) -> list[Aim]:
    """What the shipped settings should reach."""
    found = metrics(study, tables)
    return [
        Aim("success", found["success"], 0.9),
        Aim("success of every edit type", found["success_worst_type"], 0.75),
        Aim("PSNR outside the mask", found["kept_db"], 29.2, "dB"),
    ]


def texts(study: Study, tables: Tables, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The page's values beside the tables."""
    return {
        "presets": preset_table(),
        "edit": EDIT,
        "lower": LOWER_LEVELS["colour"],
        "wordings": wording_table(study, {"UnifyEdit": tables["methods"]["UnifyEdit"]}),
    }


def preset_table() -> str:
    """The chosen balances as a Markdown table."""
    names = ("combination", "beta1", "k1", "beta2", "k2")
    rows = [[name, *(f"{getattr(balance, key)}" for key in names)] for name, balance in CHOSEN.items()]
    return markdown(["edit type", *names], rows)


def search() -> dict[str, Rows]:
    """The search, with one setting for all types: ways to run UnifyEdit, and balances."""

    def every(edit: Edit) -> StudioMethod:
        return unify(dict.fromkeys(scenes.EDIT_TYPES, edit))

    wide = replace(EDIT, denoise=1.0)
    neither = Balance(beta1=0.0, beta2=0.0)
    ways = {
        f"{label}{change}": every(replace(edit, **values))
        for label, edit in (("denoise 0.6", EDIT), ("denoise 1", wide))
        for change, values in {
            ", CFG 2": {},
            ", CFG 1": {"cfg": 1.0},
            ", CFG 3": {"cfg": 3.0},
            ", CFG 2, virtual": {"mode": "virtual"},
            ", CFG 1, virtual": {"cfg": 1.0, "mode": "virtual"},
            ", CFG 2, 20 steps": {"steps": 20},
            ", CFG 2, no mask": {"masked": False, "structure_region": "everywhere"},
            ", CFG 2, neither loss": {"balance": neither},
        }.items()
    }
    ways["denoise 0.4, CFG 3, heavier words"] = every(LOWER_LEVELS["colour"])
    balances = {
        f"{label}, β1 {beta1:g}, k1 {k1:g}, β2 {beta2:g}": every(
            replace(edit, balance=Balance(beta1=beta1, k1=k1, beta2=beta2))
        )
        for label, edit in (("denoise 0.6", EDIT), ("denoise 1", wide))
        for beta1, k1, beta2 in (
            (1.0, 1.0, 0.3),
            (1.0, 1.0, 0.1),
            (1.0, 1.0, 0.0),
            (0.3, 1.0, 0.3),
            (0.5, 0.0, 0.3),
        )
    }
    return {
        "search_words": word_search.search(),
        "search_papers": paper_settings.search(),
        "search_ways": ways,
        "search_balances": balances,
    }


def wording_table(study: Study, rows: Rows) -> str:
    """A Markdown table of success by edit type and wording, which alternates."""
    kinds = {
        case.id: f"{case.edit_type}, {scenes.WORDINGS[number % 2]}" for number, case in enumerate(study.cases)
    }
    heads = [f"{edit_type}, {wording}" for edit_type in scenes.EDIT_TYPES for wording in scenes.WORDINGS]
    lines = []
    for label, method in rows.items():
        results = study.of(method)
        parts = [mean([r for r in results if kinds[r["case"]] == kind], "success") for kind in heads]
        lines.append([study.label(label, method), *(cell(value, "{:.0%}") for value in parts)])
    return markdown(["", *heads], lines)


PLAN = Plan(
    "unify_study",
    COLUMNS,
    tables,
    metrics,
    texts,
    search,
    claims,
    aims,
    shown=6,
    per_type=TUNING_PER_TYPE,
)

if __name__ == "__main__":
    command("dev.py unify-study", __doc__, PLAN, (two_objects.PLAN,))
