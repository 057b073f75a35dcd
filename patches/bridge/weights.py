"""A bridge's weights for one run: read once, cast, scaled and merged, and freed with the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...models.bridge import AttentionBridge, LayerBridge, LowRank
from ..attention.hooks import Attention, Rows
from ..attention.layers import AttentionLayer
from ..attention.networks import Network
from ..host.weights import Matrix, plain_linear, read_weights


class Update(NamedTuple):
    """LoRA updates of projections that read the same hidden states.

    names: of `q`, `k`, `v` or `out`.
    down: [updates * rank, width].
    ups: for each of them [rank, width].
    scale: of the updates.
    """

    names: tuple[str, ...]
    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    scale: float

    def onto(self, hidden: torch.Tensor, *projected: torch.Tensor) -> list[torch.Tensor]:
        """Each projection with its update of `hidden`, all [rows, tokens, width]."""
        low = F.linear(hidden.flatten(0, 1), self.down)
        return [
            torch.addmm(base.flatten(0, 1), part, up, alpha=self.scale).view(base.shape)
            for base, part, up in zip(projected, low.chunk(len(self.ups), 1), self.ups, strict=True)
        ]


def updated(updates: tuple[Update, ...], at: Attention, rows: Rows) -> list[torch.Tensor]:
    """The projections that `updates` name, of these rows and rotated, each [these rows, tokens, width]."""
    found = []
    for update in updates:
        projected = [at.projected(name, rows) for name in update.names]
        found += update.onto(at.updated(update.names[0], rows), *projected)
    if at.rotation is None:
        return found
    names = [name for update in updates for name in update.names]
    return [
        tensor if name == "v" else at.rotated(tensor, rows) for name, tensor in zip(names, found, strict=True)
    ]


class Merged(NamedTuple):
    """The output projection, its update and F as one matrix and bias."""

    matrix: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, attended: torch.Tensor) -> torch.Tensor:
        return F.linear(attended, self.matrix, self.bias)


class Chained(NamedTuple):
    """The same one after the other, through the host's own layer.

    fuse: the matrices of F, the first one first; none for a fusion without F.
    """

    project: torch.nn.Module
    update: Update | None
    fuse: tuple[torch.Tensor, ...]

    def __call__(self, attended: torch.Tensor) -> torch.Tensor:
        result = self.project(attended)
        if self.update is not None:
            (result,) = self.update.onto(attended, result)
        for matrix in self.fuse:
            result = F.linear(result, matrix)
        return result


class LayerWeights(NamedTuple):
    """A layer's weights.

    reading: updates of what the reference provides: Q, or K and V; of all three if its own rows pass through
        the bridge.
    denoising: updates of what the image being denoised provides.
    output: function from Z' before its output projection to F(Z'), or to Z' for a fusion without F.
    """

    reading: tuple[Update, ...]
    denoising: tuple[Update, ...]
    output: Merged | Chained


def prepare(
    bridge: AttentionBridge,
    network: Network,
    repaid: Callable[[AttentionLayer], bool] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, LayerWeights]:
    """Every layer's weights, by key, with a gradient for the bridge's where one is enabled.

    repaid: whether merging a layer's output pays; None merges none. Merging needs weights that stay the same.
    """
    settings, found = bridge.settings, {}
    image, reference = ("q",), ("k", "v")
    if settings.direction == "reference_queries":
        image, reference = reference, image
    if settings.reference_self_bridge:
        reference = ("q", "k", "v")
    # In a UNet all projections read the same, in a DiT each its own result.
    groups = [[(name,) for name in names] if settings.joint else [names] for names in (reference, image)]
    for key, layer in network.layers.items():
        learned, project = bridge.layer(key), network.outputs[key]
        linear = plain_linear(project) if repaid and repaid(layer) else None
        if linear is not None:
            output = _merge(learned, read_weights(linear, torch.float32, device), dtype)
        else:
            update = None if learned.out is None else _update(learned, ("out",), dtype, device)
            fuse = tuple(matrix.clone() for matrix in _fuse(learned, dtype, device))
            output = Chained(project, update, fuse)
        reading, denoising = (
            tuple(_update(learned, names, dtype, device) for names in group) for group in groups
        )
        found[key] = LayerWeights(reading, denoising, output)
    return found


def _update(learned: LayerBridge, names: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> Update:
    pairs = [_pair(getattr(learned, name), dtype, device) for name in names]
    down, ups = torch.cat([down for down, _ in pairs]), torch.stack([up for _, up in pairs])
    return Update(names, down, ups.mT.unbind(), getattr(learned, names[0]).scale)


def _pair(learned: LowRank, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`down`, [rank, width], and `up`, [width, rank]; not copies."""
    return read_weights(learned.down, dtype, device)[0], read_weights(learned.up, dtype, device)[0]


def _fuse(learned: LayerBridge, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The matrices of F; not copies."""
    if learned.fuse is None:
        return ()
    if isinstance(learned.fuse, LowRank):
        return _pair(learned.fuse, dtype, device)
    return read_weights(learned.fuse, dtype, device)[:1]


def _merge(learned: LayerBridge, base: Matrix, dtype: torch.dtype) -> Merged:
    """F (W + dW) and F b, computed in the dtype of W and b and rounded once."""
    matrix, bias = base
    wide, device = matrix.dtype, matrix.device
    if learned.out is not None:
        down, up = _pair(learned.out, wide, device)
        matrix = torch.addmm(matrix, up, down, alpha=learned.out.scale)
    for fuse in _fuse(learned, wide, device):
        matrix, bias = fuse @ matrix, None if bias is None else fuse @ bias
    return Merged(matrix.to(dtype), None if bias is None else bias.to(dtype, copy=True))
