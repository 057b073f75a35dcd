"""`python dev.py run lab.studies.two_objects`: whether UnifyEdit helps where words compete.

Of two objects one changes in shape, colour or texture. So an edit can fail in a way that a scene of one
object does not have: the other object changes, too. Rows are both losses, each alone, and the text alone, at
several scales of text guidance, with the default balance. Nothing is tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from ..benchmark.layouts import read_cases
from ..output import markdown
from . import word_search
from .claims import Aim, Claim, Comparison
from .methods import Edit, text_only, unify
from .publish import Plan, command
from .studio import Batch, Studio
from .study import Rows, Study, Tables
from .words_by_layer import localisation

LAYOUT = "tiny-studio-two"
COLUMNS = ("success", "asked", "leaked", "target_psnr", "psnr_outside", "structure")
CFGS = (1.0, 2.0, 4.0, 7.0)
FREE = Edit(denoise=1.0)  # only words say which object is meant
MASKED = Edit(denoise=1.0, masked=True, structure_region="outside")
BALANCE = Balance()
LOSSES = {
    "both": BALANCE,
    "SAP": replace(BALANCE, beta2=0.0),
    "CAA": replace(BALANCE, beta1=0.0),
    "text alone": replace(BALANCE, beta1=0.0, beta2=0.0),
}


def edits(edit: Edit) -> Rows:
    """The rows of a table."""
    return {
        name(loss, cfg): unify({scenes.TWO: replace(edit, cfg=cfg, balance=balance)})
        for cfg in CFGS
        for loss, balance in LOSSES.items()
    }


def name(loss: str, cfg: float) -> str:
    return f"CFG {cfg:g}, {loss}"


def tables() -> dict[str, Rows]:
    """The rows of every table, by the name that the page gives it."""
    return {
        "methods": edits(FREE),
        "masked": edits(MASKED),
        "noise": {f"CFG {cfg:g}": text_only(cfg) for cfg in CFGS},
    }


def metrics(study: Study, tables: Tables) -> dict[str, float]:
    """The numbers for machines: means over the scales of guidance, without a mask."""
    return {
        f"{metric}_{loss.replace(' ', '_')}": mean(
            study.mean(tables["methods"][name(loss, cfg)], metric) for cfg in CFGS
        )
        for metric in ("success", "asked", "leaked")
        for loss in LOSSES
    }


def claims(study: Study, tables: Tables) -> list[Claim]:
    """What the paper says of the two losses, at every scale of guidance."""

    rows = tables["methods"]

    def compared(metric: str, first: str, *others: str) -> tuple[Comparison, ...]:
        return tuple(
            Comparison(
                metric, (name(first, cfg), rows[name(first, cfg)]), (name(other, cfg), rows[name(other, cfg)])
            )
            for cfg in CFGS
            for other in others
        )

    return [
        Claim("Both losses together are better than either", compared("success", "both", "SAP", "CAA")),
        Claim("CAA makes the text take hold: without SAP", compared("asked", "CAA", "text alone")),
        Claim("CAA makes the text take hold: beside SAP", compared("asked", "both", "SAP")),
        Claim("SAP keeps the structure", compared("structure", "SAP", "text alone")),
    ]


def aims(study: Study, tables: Tables) -> list[Aim]:
    return []


def texts(study: Study, tables: Tables, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The page's values beside the tables."""
    return {"words": word_table(study.tiny)}


def word_table(tiny: Studio) -> str:
    """Where words look, as a Markdown table: own object against the rest / against the other object."""
    found = localisation(tiny, Batch.of(tiny, read_cases(LAYOUT, None, "tuning")), word_search.HEADS)
    lines = [
        [f"`{key}`", *("{:.2f} / {:.2f}".format(*found[key, kind]) for kind in scenes.OWN)]
        for key in dict.fromkeys(key for key, _ in found)
    ]
    return markdown(["layer", *scenes.OWN], lines)


def search() -> dict[str, Rows]:
    """The search for the alignment loss, which is the same as in scenes of one object."""
    return {"search_words": word_search.search()}


PLAN = Plan("two_objects", COLUMNS, tables, metrics, texts, search, claims, aims, 4, layout=LAYOUT)

if __name__ == "__main__":
    command("dev.py run lab.studies.two_objects", __doc__, PLAN)
