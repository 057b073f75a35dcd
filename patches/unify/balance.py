"""Balances UnifyEdit's two gradients over time (arXiv 2504.05594, Eqs. 12-15 as far as they are known).

The paper publishes the shape: the structure gradient's weight starts small and grows, the alignment
gradient's weight does the opposite, with scaling factors beta and rate factors k. It does not publish the
function or its values; the curves, the units of length and the longest steps here are this pack's own choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...pictures.plots import draw_curves

COMBINATIONS = ("balanced", "norm", "naive")


@dataclass(frozen=True, eq=False)
class Slope:
    """One loss at one latent.

    gradient: [rows, ...].
    excess: the loss above its least value, [rows]; infinite if it has none, 0 without a weight.
    unit: of length, for each row, shaped to multiply the gradient.
    """

    gradient: torch.Tensor
    excess: torch.Tensor
    unit: torch.Tensor


@dataclass(frozen=True)
class Balance:
    """How the gradients of structure (SAP) and alignment (CAA) are combined at each step.

    combination: `balanced`, unit-norm gradients with weights that change over time; `norm`, unit-norm
    gradients with constant weights beta; `naive`, the direction of the plain sum, with the length that `norm`
    would give two orthogonal gradients. No step is longer than its loss needs to reach its least value.
    beta1, k1: of SAP, with the weight beta1 exp(-k1 (1 - p)), p from 0 at pure noise to 1 at the clean image.
    beta2, k2: of CAA, with the weight beta2 exp(-k2 p).
    drawn: two curves instead of the exponentials, each of two or more equally spaced values from p = 0 to 1.
    They multiply beta1 and beta2; k1 and k2 are not used.

    Raises ValueError for an unknown combination, for factors that are negative or not finite, and for curves
    that are too short, negative or not finite.
    """

    combination: str = "balanced"
    beta1: float = 1.0
    k1: float = 1.0
    beta2: float = 0.3
    k2: float = 2.0
    drawn: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        if self.combination not in COMBINATIONS:
            raise ValueError(
                f"combination is {self.combination!r} but must be one of {', '.join(COMBINATIONS)}"
            )
        for name in ("beta1", "k1", "beta2", "k2"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value} but must be 0 or a positive number")
        for curve in self.drawn or ():
            if len(curve) < 2 or not all(math.isfinite(value) and value >= 0 for value in curve):
                raise ValueError(
                    "a drawn curve has fewer than two values, or one below 0 or not finite: draw it from 0 "
                    "upwards"
                )

    def weights(self, progress: float) -> tuple[float, float]:
        """The weights of SAP and CAA at `progress`, from 0 at pure noise to 1 at the clean image."""
        if self.combination != "balanced":
            return self.beta1, self.beta2
        if self.drawn is not None:
            structure, alignment = (_interpolate(curve, progress) for curve in self.drawn)
        else:
            structure, alignment = math.exp(-self.k1 * (1 - progress)), math.exp(-self.k2 * progress)
        return self.beta1 * structure, self.beta2 * alignment

    def move(self, structure: Slope, alignment: Slope, weights: tuple[float, float]) -> torch.Tensor:
        """What to subtract from the latent, row by row. A row whose gradient is zero or not finite adds none.

        weights: of `weights`, in each slope's unit of length.
        """
        first, second = weights[0] * structure.unit, weights[1] * alignment.unit
        if self.combination == "naive":
            both = structure.gradient + alignment.gradient
            return _step(both, torch.hypot(first, second), structure.excess + alignment.excess)
        return _step(structure.gradient, first, structure.excess) + _step(
            alignment.gradient, second, alignment.excess
        )


def _interpolate(curve: tuple[float, ...], progress: float) -> float:
    at = progress * (len(curve) - 1)
    low = min(int(at), len(curve) - 2)
    return curve[low] + (at - low) * (curve[low + 1] - curve[low])


def row_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Each row's Euclidean norm, shaped to multiply `tensor`."""
    return tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.ndim - 1))


def normalize(gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` with norm 1 in every row; rows that are zero or not finite become zero."""
    norm = row_norm(gradient)
    usable = torch.isfinite(norm) & (norm > 0)
    return torch.where(usable, gradient / norm, torch.zeros_like(gradient))


def _step(gradient: torch.Tensor, length: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
    """`gradient` with this length in every row, but at most Polyak's (1969): excess / |gradient|, at which a
    linear loss reaches its least value. Rows that are zero or not finite become zero.
    """
    norm = row_norm(gradient)
    most = (excess.view_as(norm) / norm).nan_to_num(nan=0.0, posinf=math.inf)
    return normalize(gradient) * torch.minimum(length, most)


def draw_balance(balance: Balance) -> torch.Tensor:
    """The two weights over the sampling as an IMAGE."""
    structure, alignment = zip(*(balance.weights(step / 100) for step in range(101)), strict=True)
    return draw_curves({"structure (SAP)": structure, "alignment (CAA)": alignment})
