"""`python dev.py unify-study`: UnifyEdit and its parts on 300 held-out edits, against baselines.

The page is written from stored rows; `--measure` first measures what is missing or of earlier weights.
Settings were chosen on the tuning cases, of one object and of two (`--tune` measures and prints that search).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from ..benchmark.cases import Case
from ..benchmark.statistics import mean
from ..output import markdown
from . import bridge_study, paper_settings, settings_search, two_objects, word_search
from .balances import CHOSEN, DECAYS, drawn
from .claims import Aim, Claim, Comparison
from .methods import Edit, unify
from .publish import Plan, command
from .settings_search import EDIT, MASKED, STYLE, STYLE_EDIT
from .studio import StudioMethod
from .study import Rows, Study, Tables, best, cell

COLUMNS = ("success", "target_psnr", "psnr_outside", "ssim_outside", "structure", "seconds")
Edits = Mapping[str, Edit]  # by edit type
PRESET_EDITS: Edits = {
    edit_type: STYLE_EDIT if edit_type == STYLE else EDIT for edit_type in scenes.EDIT_TYPES
}
# What the parts of the method are compared at: all noise levels, and the lower ones.
ALL_LEVELS: Edits = {
    edit_type: replace(MASKED, balance=CHOSEN[edit_type], cfg=2.0) for edit_type in scenes.EDIT_TYPES
}
LOWER_LEVELS: Edits = {edit_type: replace(edit, denoise=0.6) for edit_type, edit in ALL_LEVELS.items()}
# Still fewer noise levels, more text guidance, and a higher weight of the words.
LOWEST_LEVELS: Edits = {
    edit_type: replace(
        MASKED,
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
    wide, lower, lowest = unify(ALL_LEVELS), unify(LOWER_LEVELS), unify(LOWEST_LEVELS)
    factors, curves = {"as chosen": lower}, {"exponential": lower}
    for symbol, name in (("β1", "beta1"), ("β2", "beta2"), ("k1", "k1"), ("k2", "k2")):
        for word, factor in (("half", 0.5), ("double", 2.0)):
            factors[f"{symbol} {word}"] = balanced(LOWER_LEVELS, partial(_scaled, name, factor))
    for decay in DECAYS:
        curves[decay] = balanced(LOWER_LEVELS, partial(_drawn, decay))
    text, image, inversion = bridge_study.baselines().items()
    return {
        "methods": {
            "UnifyEdit": unify(PRESET_EDITS),
            "UnifyEdit without a mask, denoise 0.6, CFG 2": edited(
                LOWER_LEVELS, masked=False, structure_region="everywhere"
            ),
            "UnifyEdit, denoise 0.6, CFG 2": lower,
            **dict([image, inversion]),
            **paper_settings.papers(),
            **dict([text]),
        },
        "wide_losses": losses(ALL_LEVELS),
        "losses": losses(LOWER_LEVELS),
        "wide_combinations": combinations(ALL_LEVELS),
        "wide_ways": {"latent": wide, "noise": edited(ALL_LEVELS, update_target="noise")},
        "wide_inversions": {"ddim": wide, "virtual": edited(ALL_LEVELS, mode="virtual")},
        "lower_combinations": combinations(LOWEST_LEVELS),
        "lower_ways": {"latent": lowest, "noise": edited(LOWEST_LEVELS, update_target="noise")},
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
        "kept": settings_search.KEPT,
        "edit": EDIT,
        "style": STYLE_EDIT,
        "lowest": LOWEST_LEVELS["colour"],
        "wordings": wording_table(study, {"UnifyEdit": tables["methods"]["UnifyEdit"]}),
        "styles": style_table(study, {"UnifyEdit": tables["methods"]["UnifyEdit"]}),
    }


def preset_table() -> str:
    """The chosen balances as a Markdown table."""
    names = ("combination", "beta1", "k1", "beta2", "k2")
    rows = [[name, *(f"{getattr(balance, key)}" for key in names)] for name, balance in CHOSEN.items()]
    return markdown(["edit type", *names], rows)


def search() -> dict[str, Rows]:
    """The search on the tuning cases."""
    return {
        **settings_search.search(),
        "search_papers": paper_settings.search(),
        "search_words": word_search.search(),
    }


def wording_table(study: Study, rows: Rows) -> str:
    """A Markdown table of success by edit type and wording."""
    kinds = {case.id: f"{case.edit_type}, {wording}" for case, wording in worded(study)}
    heads = [f"{edit_type}, {wording}" for edit_type in scenes.EDIT_TYPES for wording in scenes.WORDINGS]
    return success_table(study, rows, kinds, heads)


def style_table(study: Study, rows: Rows) -> str:
    """A Markdown table of the success of style edits by new style and wording."""
    kinds = {
        case.id: f"{case.drawn.pair.target.values['style']}, {wording}"
        for case, wording in worded(study)
        if case.drawn and case.edit_type == STYLE
    }
    return success_table(study, rows, kinds, sorted(set(kinds.values())))


def worded(study: Study) -> list[tuple[Case, str]]:
    """The cases with their wording, which alternates."""
    return [(case, scenes.WORDINGS[number % 2]) for number, case in enumerate(study.cases)]


def success_table(study: Study, rows: Rows, kinds: Mapping[str, str], heads: Sequence[str]) -> str:
    """A Markdown table of success by the kinds of the cases. kinds: by the case's id; some may have none."""
    lines = []
    for label, method in rows.items():
        results = study.of(method)
        parts = [mean([r for r in results if kinds.get(r["case"]) == kind], "success") for kind in heads]
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
)

if __name__ == "__main__":
    command("dev.py unify-study", __doc__, PLAN, (two_objects.PLAN,))
