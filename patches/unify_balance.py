"""Balancing UnifyEdit's two gradients over time (arXiv 2504.05594, Eqs. 12-15 as far as they are known).

Published is the shape: the structure gradient's weight starts small and grows, the alignment gradient's does
the opposite, with scaling factors beta and rate factors k. The function and its values are not; the
exponentials here are this pack's own choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from .plots import draw_curves

COMBINATIONS = ("balanced", "norm", "naive")


@dataclass(frozen=True)
class Balance:
    """How the gradients of structure (SAP) and alignment (CAA) are put together at each step.

    combination: `balanced`, unit-norm gradients with weights that change over time; `norm`, unit-norm
    gradients with constant weights beta; `naive`, the direction of the plain sum, with the length that `norm`
    would give two gradients at right angles. beta1, k1 belong to SAP, beta2, k2 to CAA.

    Raises ValueError for an unknown combination and for factors that are negative or not finite.
    """

    combination: str = "balanced"
    beta1: float = 1.0
    k1: float = 2.0
    beta2: float = 1.0
    k2: float = 2.0

    def __post_init__(self) -> None:
        if self.combination not in COMBINATIONS:
            raise ValueError(
                f"combination is {self.combination!r} but must be one of {', '.join(COMBINATIONS)}"
            )
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name} is {value} but must be 0 or a positive number")

    def weights(self, progress: float) -> tuple[float, float]:
        """The weights of SAP and CAA at `progress`, from 0 at pure noise to 1 at the clean image."""
        if self.combination != "balanced":
            return self.beta1, self.beta2
        return self.beta1 * math.exp(-self.k1 * (1 - progress)), self.beta2 * math.exp(-self.k2 * progress)

    def direction(self, structure: torch.Tensor, alignment: torch.Tensor, progress: float) -> torch.Tensor:
        """The combined gradient, row by row; a row whose gradient is zero or not finite adds nothing.

        structure, alignment: gradients of the two losses, [rows, ...]. Its length is of the order of the
        weights.
        """
        if self.combination == "naive":
            return math.hypot(self.beta1, self.beta2) * unit(structure + alignment)
        first, second = self.weights(progress)
        return first * unit(structure) + second * unit(alignment)


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
