"""Balancing UnifyEdit's two gradients over time (arXiv 2504.05594, Eqs. 12-15 as far as they are known).

Published is the shape: the structure gradient's weight starts small and grows, the alignment gradient's does
the opposite, with scaling factors beta and rate factors k. The function and its values are not; the curves
here are this pack's own choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...pictures.plots import draw_curves

COMBINATIONS = ("balanced", "norm", "naive")
# What is left of a weight at rate times distance from the end where it is whole.
_FALLS = {
    "exponential": lambda distance: math.exp(-distance),
    "linear": lambda distance: max(0.0, 1 - distance),
    "cosine": lambda distance: (1 + math.cos(math.pi * min(1.0, distance))) / 2,
}
CURVES = (*_FALLS, "drawn")


@dataclass(frozen=True)
class Balance:
    """How the gradients of structure (SAP) and alignment (CAA) are put together at each step.

    combination: `balanced`, unit-norm gradients with weights that change over time; `norm`, unit-norm
    gradients with constant weights beta; `naive`, the direction of the plain sum, with the length that `norm`
    would give two gradients at right angles. beta1, k1 belong to SAP, beta2, k2 to CAA.

    curve: with p from 0 at pure noise to 1 at the clean image, the weights of `balanced` are beta1 f(k1 (1 -
    p)) and beta2 f(k2 p), where f(u) is exp(-u) (`exponential`), 1 - u (`linear`) or (1 + cos(pi u)) / 2
    (`cosine`), the last two 0 beyond u = 1. `drawn`: beta1 and beta2 times the curves in `drawn`, each of two
    or more values at equal distances from p = 0 to 1; the k are not used.

    Raises ValueError for an unknown combination or curve, for factors that are negative or not finite, and
    for drawn curves that are missing, negative or not finite.
    """

    combination: str = "balanced"
    beta1: float = 1.0
    k1: float = 1.0
    beta2: float = 0.3
    k2: float = 2.0
    curve: str = "exponential"
    drawn: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("combination", COMBINATIONS), ("curve", CURVES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be one of {', '.join(choices)}")
        for name in ("beta1", "k1", "beta2", "k2"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value} but must be 0 or a positive number")
        if self.curve == "drawn":
            if self.drawn is None or min(map(len, self.drawn)) < 2:
                raise ValueError("curve is drawn but the drawn curves are missing: draw both")
            if not all(math.isfinite(value) and value >= 0 for curve in self.drawn for value in curve):
                raise ValueError("a drawn curve has a value below 0 or not finite: draw it from 0 upwards")

    def weights(self, progress: float) -> tuple[float, float]:
        """The weights of SAP and CAA at `progress`, from 0 at pure noise to 1 at the clean image."""
        if self.combination != "balanced":
            return self.beta1, self.beta2
        if self.curve == "drawn":
            first, second = (_interpolated(curve, progress) for curve in self.drawn)
        else:
            fall = _FALLS[self.curve]
            first, second = fall(self.k1 * (1 - progress)), fall(self.k2 * progress)
        return self.beta1 * first, self.beta2 * second

    def direction(self, structure: torch.Tensor, alignment: torch.Tensor, progress: float) -> torch.Tensor:
        """The combined gradient, row by row; a row whose gradient is zero or not finite adds nothing.

        structure, alignment: gradients of the two losses, [rows, ...]. Its length is of the order of the
        weights.
        """
        if self.combination == "naive":
            return math.hypot(self.beta1, self.beta2) * unit(structure + alignment)
        first, second = self.weights(progress)
        return first * unit(structure) + second * unit(alignment)


def _interpolated(curve: tuple[float, ...], progress: float) -> float:
    place = progress * (len(curve) - 1)
    low = min(int(place), len(curve) - 2)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])


def row_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Each row's Euclidean norm, shaped to multiply `tensor`."""
    return tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.ndim - 1))


def unit(gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` with every row's norm at 1; rows that are zero or not finite become zero."""
    norm = row_norm(gradient)
    usable = torch.isfinite(norm) & (norm > 0)
    return torch.where(usable, gradient / norm, torch.zeros_like(gradient))


def draw_balance(balance: Balance) -> torch.Tensor:
    """The two weights over the sampling as an IMAGE."""
    structure, alignment = zip(*(balance.weights(step / 100) for step in range(101)), strict=True)
    return draw_curves({"structure (SAP)": structure, "alignment (CAA)": alignment})
