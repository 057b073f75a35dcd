"""Whether another node has put the tokens of a self-attention into another order before it.

Merged tokens are seen by their number. Tokens that were only moved (shuffles, a token merging that merges
none) keep it, so their values are compared: a place's value is then another one's, and all values are still
there. Nothing waits for the device until someone asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from ...models.sites import SiteKey


class TokenOrder:
    """Watches the chain of `attn1_patch` of one model call at some layers.

    wanted: ("attn1", key) of each layer that is looked at; what is taken out of it meanwhile is not. After
    the call `moved` holds, for each layer whose tokens another node replaced by as many, its name and a bool
    tensor.
    """

    def __init__(self, wanted: Collection[tuple[str, SiteKey]]) -> None:
        self._wanted = wanted
        self._first: torch.Tensor | None = None
        self.moved: list[tuple[str, torch.Tensor]] = []

    def around(self, patches: list[Callable]) -> list[Callable]:
        """The same chain, watched; an empty one stays as it is."""
        return [self._before, *patches, self._after] if patches else patches

    def _before(self, n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        self._first = n
        return n, context, value

    def _after(self, n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        first, self._first = self._first, None
        key = (*extra["block"], extra["block_index"])
        if ("attn1", key) in self._wanted:
            for now in (n, context):
                if now is not first and now.shape == first.shape:
                    self.moved.append((".".join(map(str, key)), _moved(first, now)))
        return n, context, value


def first_moved(moved: Collection[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first layer whose tokens were moved, or None. Waits for the device if any were."""
    if not moved:
        return None
    flags = torch.stack([flag for _, flag in moved]).tolist()
    return next((name for (name, _), flag in zip(moved, flags, strict=True) if flag), None)


@torch.no_grad()
def _moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Whether the tokens of any row, [rows, tokens, width], are the same ones in another order."""
    before, after = before[..., 0], after[..., 0]
    same = (before.sort(dim=1).values == after.sort(dim=1).values).all(dim=1)
    return (same & (before != after).any(dim=1)).any()
