"""Estimates the memory of UnifyEdit's gradients, which is requested from the host.

The estimate is the peak, for a forward whose weights have no gradient:

- What autograd keeps. Of a ResBlock: the inputs of both norms, activations and convolutions. Of a
transformer: its input, those of its convolutions, and of each of its blocks 21 times its tokens (inputs of
three norms; queries, keys, values and results of attention; 12 for the gated feed-forward). With
checkpointing: the layers' inputs, and the recorded queries and keys. Of a DiT's block: its input, and 15
times its tokens (inputs of two norms; queries and keys before their norm; queries, keys, values and results
of attention; 4 to 6 for the feed-forward), a text's among them.
- The source's queries and keys.
- The larger of two phases. A loss: its derivatives with respect to queries and keys in float32, and one piece
of a map: its probabilities, the source's, their difference, and two more for its gradient. The backward pass:
those derivatives in the network's dtype, what exists during the backward pass through one block of a
transformer, and, with checkpointing, the inside of one block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import comfy.model_management
import comfy.samplers
import torch

from ..attention.layers import AttentionLayer, Block
from ..attention.networks import Network
from ..attention.projections import PIECE
from ..host.autograd import weights_streamed
from .plan import Layers

TEXT_TOKENS = 77
# Operations in the time of launching a pass: on a multiprocessor of a GPU in half precision, and on a thread
# of a CPU. The first is estimated from an H200, where one row of SD1.5 costs what three do up to 768x768
# pixels, and has not been tried on a card. The second lies between the narrow network of `dev.py bench`,
# where joined rows take less time, and SD1.5's width, where they take more.
_PER_MULTIPROCESSOR, _PER_THREAD = 8e9, 2e8
_BLOCK, _JOINT, _BACK, _MAPS = 21, 15, 16, 5


class MemoryPlan(NamedTuple):
    """How gradients are computed.

    size: bytes of one.
    checkpointing: whether blocks are computed again for it.
    joined: whether the source and a row of the target for each loss run together.
    """

    size: float
    checkpointing: bool
    joined: bool


def plan_memory(
    guider: comfy.samplers.CFGGuider, x: torch.Tensor, layers: Layers, checkpoint: bool, virtual: bool
) -> MemoryPlan:
    """The fastest way that fits.

    Rows are joined if a row's arithmetic takes less time than a pass through the network takes to launch
    (`few_operations`), and not for a virtual inversion, whose source runs to the end of the network. If
    weights are streamed, and their copies do not fit beside it, rows are not joined, and then blocks are
    computed again.

    guider: the host's, in a run.
    x: the sampled latent.
    """
    patcher, model, network = guider.model_patcher, guider.inner_model, layers.network
    itemsize, streamed = model.get_dtype_inference().itemsize, weights_streamed([patcher])
    where = layers.structure, layers.words
    few = not virtual and few_operations(row_operations(network, where, x.shape), x.device, itemsize)
    ways = [(checkpoint, few), (checkpoint, False), (True, False)]

    def needed(checkpoint: bool, joined: bool) -> float:
        copies = copied_bytes(network, [*where[0], *where[1]], itemsize, checkpoint) if streamed else 0
        return backward_bytes(network, *where, x.shape, itemsize, checkpoint, joined) + copies

    if not streamed:
        return MemoryPlan(needed(*ways[0]), *ways[0])
    free = comfy.model_management.get_free_memory(x.device)
    if patcher.is_dynamic():  # its weights make room by themselves
        free += patcher.loaded_size()
    free -= model.memory_required(list(x.shape))
    chosen = next((way for way in ways if needed(*way) <= free), ways[-1])
    if chosen[0] and not checkpoint:
        logging.info("UnifyEdit: memory is short: layers are computed again for their gradient")
    return MemoryPlan(needed(*chosen), *chosen)


def row_operations(
    network: Network, layers: Sequence[Collection[AttentionLayer]], shape: Sequence[int]
) -> int:
    """Additions and multiplications in one row's forward up to the last of `layers`, to a quarter: two for
    each weight and position of the image.

    shape: the latent's, [rows, channels, height, width].
    """
    paths, found = {layer.path for part in layers for layer in part}, 0
    for block in network.blocks(*shape[-2:]):
        if not paths:
            break
        found += 2 * block.tokens * block.weights
        paths = _after(paths, block)
    return found * shape[0]


def _after(paths: set[str], block: Block) -> set[str]:
    """Those of the layers' paths that are not in `block`."""
    return {path for path in paths if not f"{path}.".startswith(f"{block.path}.")}


def few_operations(count: int, device: torch.device, itemsize: int) -> bool:
    """Whether the device computes so many operations faster than Python launches a pass through the network.

    itemsize: bytes of a number. A GPU computes about four times as fast in half precision.
    """
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return count < _PER_MULTIPROCESSOR * processors * (2 / itemsize) ** 2
    return device.type == "cpu" and count < _PER_THREAD * torch.get_num_threads()


def backward_bytes(
    network: Network,
    self_layers: Collection[AttentionLayer],
    cross_layers: Collection[AttentionLayer],
    shape: Sequence[int],
    itemsize: int,
    checkpoint: bool,
    joined: bool = False,
) -> int:
    """Bytes of the graph from a latent to the recorded attentions, with their losses and gradients.

    shape: the latent's, [rows, channels, height, width].
    itemsize: bytes of a number in the network.
    checkpoint: with every layer's inside computed again, one at a time.
    joined: with rows of the source and of the target for each loss.
    """
    rows, _, height, width = shape
    copies = 2 * bool(self_layers) + bool(cross_layers) if joined else 1
    paths = {layer.path for layer in (*self_layers, *cross_layers)}
    if not paths:
        return 0
    kept, inside, back = _graph(network, paths, height, width)

    def queries(layer: AttentionLayer) -> int:
        return math.prod(layer.places(height, width))

    def keys(layer: AttentionLayer) -> int:
        return math.prod(layer.grid(height, width)) + network.joint_text

    joint = bool(network.joint_text)  # then words have the image's keys too, which have a gradient
    structure = sum((queries(layer) + keys(layer)) * layer.width for layer in self_layers)
    words = sum((queries(layer) + joint * keys(layer)) * layer.width for layer in cross_layers)
    within = sum(layer.heads * queries(layer) * keys(layer) for layer in self_layers)
    across = sum(
        layer.heads * queries(layer) * (keys(layer) if joint else TEXT_TOKENS) for layer in cross_layers
    )
    maps = max(within, across) if joint else within + across
    kept += structure + (structure + words if checkpoint else sum(inside))
    back += max(inside) if checkpoint else 0
    slopes = rows * (structure + words if joined else max(structure, words))
    piece = min(PIECE, rows * maps)
    return rows * copies * kept * itemsize + max(
        4 * (slopes + _MAPS * piece), itemsize * (slopes + rows * copies * back)
    )


def _graph(network: Network, paths: set[str], height: int, width: int) -> tuple[int, list[int], int]:
    """Numbers per row up to the last of `paths`.

    They are what autograd keeps of the blocks' inputs and of the inside of each block, and what exists during
    the backward pass through the largest block of a transformer.
    """
    kept, inside, back = 0, [], 0
    for block in network.blocks(height, width):
        kept += block.tokens * block.inputs
        if block.kind == "residual":
            inside.append(block.tokens * (2 * block.inputs + 3 * block.outputs))
        elif block.kind == "transformer":
            around = 2 if block.convolved else 0
            inside.append(block.tokens * block.inputs * (_BLOCK * block.depth + around))
            back = max(back, block.tokens * block.inputs * _BACK)
            paths = _after(paths, block)
            if not paths:
                break
        elif block.kind == "joint":
            inside.append(block.tokens * block.inputs * _JOINT)
            back = max(back, block.tokens * block.inputs * _BACK)
            paths = _after(paths, block)
            if not paths:
                break
    return kept, inside, back


def copied_bytes(
    network: Network, layers: Collection[AttentionLayer], itemsize: int, checkpoint: bool
) -> int:
    """Bytes of the weights that a gradient keeps copies of if the host streams them (`gradients`).

    They are the weights of every block up to the last of `layers`, or of the largest one if blocks are
    computed again one at a time.
    """
    paths, weights = {layer.path for layer in layers}, [0]
    for block in network.blocks(1, 1):
        if not paths:
            break
        weights.append(block.weights)
        paths = _after(paths, block)
    return itemsize * (max(weights) if checkpoint else sum(weights))
