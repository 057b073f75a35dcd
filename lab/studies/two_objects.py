"""`python dev.py run lab.studies.two_objects`: whether UnifyEdit helps where words compete.

Scenes have two objects, of which one changes in shape, colour or texture. An edit can fail in a way that scenes
of one object do not have: the other object changes, too. Rows are the text alone, each loss, and both, at
several scales of text guidance.
"""

from __future__ import annotations

from dataclasses import replace

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from .methods import Edit, text_only, unify
from .study import Rows

CFGS = (1.0, 2.0, 4.0, 7.0)
FREE = Edit(denoise=1.0)  # no mask: nothing but words says which object is meant
MASKED = Edit(denoise=1.0, masked=True, structure_region="outside")
BOTH = Balance()
LOSSES = {
    "text alone": replace(BOTH, beta1=0.0, beta2=0.0),
    "SAP": replace(BOTH, beta2=0.0),
    "CAA": replace(BOTH, beta1=0.0),
    "both": BOTH,
}


def edits(edit: Edit, cfg: float) -> Rows:
    """The four rows of a table."""
    return {
        label: unify({scenes.TWO: replace(edit, cfg=cfg, balance=balance)})
        for label, balance in LOSSES.items()
    }


def tables() -> dict[str, Rows]:
    """The rows of every table, by its name."""
    found: dict[str, Rows] = {"noise": {f"CFG {cfg:g}": text_only(cfg) for cfg in CFGS}}
    for name, edit in (("free", FREE), ("masked", MASKED)):
        for cfg in CFGS:
            found[f"{name}_{cfg:g}"] = edits(edit, cfg)
    return found
