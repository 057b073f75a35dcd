"""Balances of UnifyEdit that only the study needs: by edit type, and other curves."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...models.tiny_studio import scenes
from ...patches.unify.balance import Balance

# Chosen on the tuning cases (`python dev.py unify-study --tune`), where only style needed other values than
# the rest, and simple and complex descriptions showed no difference.
CHOSEN: dict[str, Balance] = {
    edit_type: Balance(beta1=0.3 if edit_type == "style" else 1.0) for edit_type in scenes.EDIT_TYPES
}
# Decay curves: f(0) = 1, u = rate * distance.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda distance: max(0.0, 1 - distance),
    "cosine": lambda distance: (1 + math.cos(math.pi * min(1.0, distance))) / 2,
}
_POINTS = 1001


def drawn(balance: Balance, decay: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The curves of a decay with the balance's k, for `Balance.drawn`."""
    fall, along = DECAYS[decay], [point / (_POINTS - 1) for point in range(_POINTS)]
    structure = tuple(fall(balance.k1 * (1 - progress)) for progress in along)
    return structure, tuple(fall(balance.k2 * progress) for progress in along)
