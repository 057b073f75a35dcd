"""Detects whether another node has reordered the tokens of a self-attention.

Merged tokens are detected by their number. Tokens that were only moved (shuffles, a token merging that merges
none) keep their number, so their values are compared: all values are still there, at other tokens. Nothing
waits for the device until `first_moved` is called.
"""

from __future__ import annotations

from collections.abc import Collection

import torch


@torch.no_grad()
def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Whether the tokens of any row, [rows, tokens, width], are the same ones in another order; a bool
    tensor.
    """
    before, after = before[..., 0], after[..., 0]
    same = (before.sort(dim=1).values == after.sort(dim=1).values).all(dim=1)
    return (same & (before != after).any(dim=1)).any()


def first_moved(found: Collection[tuple[str, torch.Tensor]]) -> str | None:
    """The first layer whose tokens were moved, or None. Waits for the device if `found` is not empty.

    found: layers' keys with the result of `moved`.
    """
    if not found:
        return None
    flags = torch.stack([flag for _, flag in found]).tolist()
    return next((key for (key, _), flag in zip(found, flags, strict=True) if flag), None)
