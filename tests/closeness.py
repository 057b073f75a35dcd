"""How equal two results are to be. A CPU computes a row the same way whatever stands beside it; on a card the
kernels, and with them the order of sums, differ between batch sizes, and some gradients between two runs.
"""

from __future__ import annotations

import torch
from host import device


def tolerance(dtype: torch.dtype = torch.float32) -> float:
    """The share of a result's scale that rounding may change where a model computes in `dtype`: 1e-5, on a
    card 2e-4, and 1e-3 in half precision.
    """
    if device().type == "cpu":
        return 1e-5
    return 2e-4 if dtype == torch.float32 else 1e-3


def same(found: torch.Tensor, expected: torch.Tensor, times: float = 1) -> bool:
    """Equal to `times` `tolerance()` of the expected values' deviation, on whichever devices they are."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max()) <= times * tolerance() * float(expected.std())


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in every bit; on a card the difference is below a thousandth of what is there, both as norms: for
    what was learned in another process, which the tests cannot ask for deterministic kernels. An optimiser
    that divides by the size of a gradient makes much of rounding where that is near zero.
    """
    if device().type == "cpu":
        return torch.equal(found, expected)
    return bool((found.float() - expected.float()).norm() <= 1e-3 * expected.float().norm())
