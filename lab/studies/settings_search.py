"""The search for UnifyEdit's settings, on tuning cases.

Settings that keep less than KEPT outside the mask are out. Of the others one takes the place of the chosen
one if it is better by more than chance, in success or in PSNR to the true edit, and not worse in the other.
Edits with a mask and styles, which have none, are searched apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance
from .methods import Edit, unify
from .studio import STEPS
from .study import Rows

KEPT = 29.2  # dB
STYLE = "style"
WITH_MASK = tuple(edit_type for edit_type in scenes.EDIT_TYPES if edit_type != STYLE)
MASKED = Edit(masked=True, structure_region="outside")
# No other setting of this search takes their places.
EDIT = replace(MASKED, denoise=0.8, cfg=1.5)
STYLE_EDIT = Edit(Balance(beta1=0.3), cfg=2.0, denoise=1.0, mode="virtual", steps=STEPS)


def name(edit: Edit) -> str:
    """What distinguishes the settings of the search."""
    balance, default = edit.balance, Balance()
    parts = [f"denoise {edit.denoise:g}", f"CFG {edit.cfg:g}"]
    if edit.steps != Edit.steps:
        parts.append(f"{edit.steps} steps")
    if balance.beta1 != default.beta1:
        parts.append(f"β1 {balance.beta1:g}")
    if balance.k1 != default.k1:
        parts.append(f"k1 {balance.k1:g}")
    if edit.mode != Edit.mode:
        parts.append(edit.mode)
    return ", ".join(parts)


def with_mask() -> Iterator[Edit]:
    """For edits with a mask."""
    for denoise, cfg in product((0.6, 0.8, 1.0), (1.5, 2.0)):
        yield replace(MASKED, denoise=denoise, cfg=cfg)
    for denoise, cfg in ((0.4, 3.0), (0.6, 3.0), (0.8, 3.0), (0.4, 4.0)):
        yield replace(MASKED, denoise=denoise, cfg=cfg)
    yield replace(MASKED, denoise=0.6, cfg=3.0, steps=STEPS)


def styles() -> Iterator[Edit]:
    """For styles: one setting after the other."""
    weak = Balance(beta1=0.3)
    for denoise, cfg in product((0.6, 0.8, 1.0), (1.5, 2.0, 3.0)):
        yield Edit(weak, cfg, denoise)
    middle = Edit(weak, 2.0, 0.8)
    for beta1 in (1.0, 0.1, 0.0):
        yield replace(middle, balance=replace(weak, beta1=beta1))
    yield replace(middle, balance=replace(weak, k1=0.0))
    for denoise, cfg in ((0.8, 2.0), (0.8, 3.0), (1.0, 2.0), (1.0, 3.0)):
        yield replace(middle, denoise=denoise, cfg=cfg, mode="virtual")
    for cfg, mode in product((2.0, 3.0), ("virtual", "ddim")):
        yield replace(middle, denoise=1.0, cfg=cfg, mode=mode, steps=STEPS)


def search() -> dict[str, Rows]:
    """All settings that were tried, with a mask and for styles; the chosen one first."""
    masked = dict.fromkeys((EDIT, *with_mask()))
    without = dict.fromkeys((STYLE_EDIT, *styles()))
    return {
        "search_masked": {
            f"with a mask, {name(edit)}": unify(dict.fromkeys(WITH_MASK, edit)) for edit in masked
        },
        "search_styles": {f"style, {name(edit)}": unify({STYLE: edit}) for edit in without},
    }
