"""Queries and keys of an attention, and the maps that are computed from them.

Queries and keys are kept, not probabilities, which take up to a hundred times the memory. Probabilities are
computed from them when needed, one piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import einsum, rearrange

from .hooks import Attention, rotate

PIECE = 2**24  # probabilities at a time: 64 MiB


class Piece(NamedTuple):
    """A part of an attention's probabilities: some of its heads, some of its queries, all of its columns."""

    heads: slice = slice(None)
    queries: slice = slice(None)


_WHOLE = Piece()


class Columns(NamedTuple):
    """The columns of a map of a joint attention: a part of its keys, as they are or summed up.

    first, count: of the keys.
    grid: their rows and columns in the image; None for a text's.
    places: rows and columns of the map, a column for each place, which is the sum of its keys; None for a
        column for each key.
    """

    first: int
    count: int
    grid: tuple[int, int] | None = None
    places: tuple[int, int] | None = None

    def of(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The map, [..., columns], of probabilities of all keys, [..., keys]."""
        own = probabilities[..., self.first : self.first + self.count]
        if self.grid is None or self.places is None or self.grid == self.places:
            return own
        rows, columns = (
            (_place(size, count, own.device) == torch.arange(count, device=own.device)[:, None]).to(own)
            for size, count in zip(self.grid, self.places, strict=True)
        )
        own = einsum(own.unflatten(-1, self.grid), rows, "... h w, r h -> ... r w")
        return einsum(own, columns, "... r w, c w -> ... r c").flatten(-2)

    @property
    def number(self) -> int:
        return self.count if self.places is None else math.prod(self.places)


def _place(size: int, count: int, device: torch.device) -> torch.Tensor:
    """Which of `count` places each of `size` tokens along a side belongs to."""
    return torch.arange(size, device=device) * count // size


def _middles(grid: tuple[int, int], places: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The token in the middle of each place."""
    rows, columns = (
        ((2 * torch.arange(count, device=device) + 1) * size) // (2 * count)
        for size, count in zip(grid, places, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()


@dataclass(frozen=True, eq=False)
class Projections:
    """The queries and keys of one attention in one model call, or of several (`stack`).

    q: [rows, queries, heads * d] in the network's dtype; a row is an image of the call's batch. Of several
    attentions [attentions, rows, ...].
    k: [rows, keys, heads * d].
    heads: of the attention.
    part: of a joint attention, whose probabilities are of all keys: the columns of its map. None if there is
        one for each key.

    If the call has a gradient, q and k are in its graph.
    """

    q: torch.Tensor
    k: torch.Tensor
    heads: int
    part: Columns | None = None

    @property
    def columns(self) -> int:
        """Of the map."""
        return self.k.shape[-2] if self.part is None else self.part.number

    def chunk(self, count: int) -> list[Projections]:
        """The same in `count` parts of as many rows."""
        parts = (
            zip(self.q.chunk(count), self.k.chunk(count), strict=True) if count > 1 else [(self.q, self.k)]
        )
        return [replace(self, q=q, k=k) for q, k in parts]

    def detach(self) -> Projections:
        """The same outside of every graph."""
        return replace(self, q=self.q.detach(), k=self.k.detach())

    def pieces(self, whole_heads: bool = False) -> Iterator[Piece]:
        """Pieces of at most PIECE probabilities, or of one query, that together cover all.

        whole_heads: every piece has all queries of its heads.
        """
        *rows, queries, _ = self.q.shape
        line = math.prod(rows) * self.k.shape[-2]
        heads = max(1, PIECE // (line * queries))
        count = queries if whole_heads or line * queries <= PIECE else max(1, PIECE // line)
        for head in range(0, self.heads, heads):
            for query in range(0, queries, count):
                yield Piece(slice(head, head + heads), slice(query, query + count))

    def probabilities(self, piece: Piece = _WHOLE) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) of the piece, [rows, heads, queries, columns] in float32.

        It sums to 1 over all keys.
        """
        q, k = (rearrange(part, "... n (h d) -> ... h n d", h=self.heads) for part in (self.q, self.k))
        q, k = q[..., piece.heads, piece.queries, :].float(), k[..., piece.heads, :, :].float()
        scores = einsum(q, k, "... h i d, ... h j d -> ... h i j")
        found = scores.mul_(q.shape[-1] ** -0.5).softmax(dim=-1)
        return found if self.part is None else self.part.of(found)

    def mean(self) -> torch.Tensor:
        """The probabilities' mean over heads, [rows, queries, columns] in float32."""
        total = self.q.new_zeros(*self.q.shape[:2], self.columns, dtype=torch.float32)
        for piece in self.pieces():
            total[:, piece.queries] += self.probabilities(piece).sum(dim=1)
        return total.div_(self.heads)


def stack(attentions: Sequence[Projections]) -> Projections:
    """Several attentions of the same shapes in one."""
    q, k = (torch.stack(tensors) for tensors in zip(*((one.q, one.k) for one in attentions), strict=True))
    return replace(attentions[0], q=q, k=k)


def project(at: Attention) -> Projections:
    """What the maps of an attention of this kind are computed from.

    Of a joint attention the probabilities are those of the model, of all its keys: with `attn1` a map of the
    image's places to each other, with `attn2` of the places to the text. A place asks with its middle token.
    Averaging tokens that were rotated by their positions would have no meaning.
    """
    joint, heads = at.joint, at.layer.heads
    if joint is None:
        return Projections(at.q, at.k, heads)
    assert at.grid is not None
    places = at.layer.on(at.grid)
    q, k, rotation = at.q.flatten(2), joint.k.transpose(1, 2).flatten(2), joint.rotation
    own = at.rotation
    if places != at.grid:
        middles = _middles(at.grid, places, q.device)
        q, own = q[:, middles], None if own is None else own[:, :, middles]
    if rotation is not None and own is not None:
        q, k = rotate(q, own, heads), rotate(k, rotation, heads)
    if at.kind == "attn1":
        return Projections(q, k, heads, Columns(joint.text, math.prod(at.grid), at.grid, places))
    return Projections(q, k, heads, Columns(0, joint.text))
