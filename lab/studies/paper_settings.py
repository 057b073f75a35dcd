"""Settings of the other papers' methods: as many are tried for each.

One is chosen by halving: all on 12 tuning cases, the two best of them on 24. The best has the highest
success, and of several with it the highest PSNR to the true edit. Guide-and-Rescale, the strongest, was
searched on 60 and 240 cases, too, and has a second row with a setting for styles alone, as UnifyEdit has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...models.tiny_studio import scenes
from .methods import by_type
from .paper_methods import guide_and_rescale, infedit, injected, masactrl, pix2pix_zero
from .settings_search import STYLE
from .studio import StudioMethod
from .study import Rows

CFGS = (1.0, 1.5, 2.5)  # along an inversion more guidance loses the image


@dataclass(frozen=True)
class Tuned:
    """A method with its search: two strengths of its own at every scale of text guidance.

    make: of the scale and a strength.
    strengths: arguments of `make` after the scale, by what the table calls them.
    chosen: arguments of `make`.
    style: the same for styles alone, if they have their own.
    """

    make: Callable[..., StudioMethod]
    strengths: Mapping[str, tuple[Any, ...]]
    chosen: tuple[Any, ...]
    style: tuple[Any, ...] = ()


TUNED = {
    "attention injection": Tuned(
        injected, {"self 0.2, cross 0.4": (0.2, 0.4), "self 0.4, cross 0.8": (0.4, 0.8)}, (1.5, 0.2, 0.4)
    ),
    "MasaCtrl": Tuned(
        partial(masactrl, start=0.1),
        {"the decoder": ("output",), "the decoder's last half": ("output.3, output.4, output.5",)},
        (1.0, "output.3, output.4, output.5"),
    ),
    "pix2pix-zero": Tuned(pix2pix_zero, {"rate 0.1": (0.1,), "rate 0.3": (0.3,)}, (1.5, 0.3)),
    "Guide-and-Rescale": Tuned(
        guide_and_rescale, {"scale 1,000": (1e3,), "scale 10,000": (1e4,)}, (1.5, 1e4), (1.5, 1e3)
    ),
    "InfEdit": Tuned(
        infedit, {"self 0.3, cross 0.7": (0.3, 0.7), "self 0.5, cross 0.9": (0.5, 0.9)}, (1.0, 0.3, 0.7)
    ),
}


def papers() -> Rows:
    """Each method with its chosen setting, and those that have another one for styles with both."""
    rows = {name: tuned.make(*tuned.chosen) for name, tuned in TUNED.items()}
    apart = {
        f"{name}, styles apart": by_type(
            {
                kind: tuned.make(*(tuned.style if kind == STYLE else tuned.chosen))
                for kind in scenes.EDIT_TYPES
            }
        )
        for name, tuned in TUNED.items()
        if tuned.style
    }
    return rows | apart


def search() -> Rows:
    """All settings that were tried."""
    return {
        f"{name}, CFG {cfg:g}, {label}": tuned.make(cfg, *strength)
        for name, tuned in TUNED.items()
        for label, strength in tuned.strengths.items()
        for cfg in CFGS
    }
