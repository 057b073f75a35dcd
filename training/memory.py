"""Memory that training needs, so that the host can make room for it.

Counted is what autograd keeps of a forward with a bridge, as `lab.bench.training` measures it on the real
modules:

- of a ResBlock, three times its inputs and outputs;
- of a transformer, 32 times its tokens (norms, projections, queries, keys, values, attention, gated
  feed-forward and the bridge's part) and its text's keys and values;
- of a DiT's block, 21 times its tokens, those of the text among them;
- of a checkpointed layer, its input and what the bridge reads of the reference, and once the largest layer
  that is computed again, with its gradient.

To this come copies of weights: those cast to another dtype, and those that the host streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from comfy.model_base import BaseModel

from ..models.bridge import AttentionBridge
from ..patches.attention.dit import DiT
from ..patches.attention.networks import Network, network_of
from ..patches.unify.memory import TEXT_TOKENS, copied_bytes
from .settings import PRECISIONS, TrainSettings

_RESBLOCK, _TRANSFORMER, _JOINT, _BANK, _BACK, _TEXT = 3, 32, 21, 2, 16, 2 * TEXT_TOKENS
# Of float32: the weights, their gradient, and both of AdamW's averages.
_LEARNED = 4


def training_bytes(
    model: BaseModel,
    bridge: AttentionBridge,
    settings: TrainSettings,
    sizes: Sequence[tuple[int, int]],
    streamed: bool,
) -> int:
    """Bytes that a training step needs beside the network's weights, for the largest of the latents' `sizes`.

    model: the host's BaseModel. streamed: whether the host streams its weights.
    """
    network = network_of(model.diffusion_model)
    dtype = PRECISIONS[settings.precision] or model.get_dtype_inference()
    itemsize = torch.empty((), dtype=dtype).element_size()
    size = max(sizes, key=math.prod)
    numbers = _kept(network, size, settings.checkpointing)
    parameters = sum(weight.numel() for weight in bridge.parameters())
    copies = _LEARNED + bool(settings.ema)
    # The bridge's weights as a forward computes with them, and cast again by autocast.
    ready = model.get_dtype_inference().itemsize + (itemsize if PRECISIONS[settings.precision] else 0)
    needed = settings.batch * numbers * itemsize + parameters * (4 * copies + ready)
    if streamed or dtype != model.get_dtype():
        needed += copied_bytes(network, network.layers.values(), itemsize, settings.checkpointing)
    return needed


def _kept(network: Network, size: tuple[int, int], checkpointing: bool) -> int:
    """Numbers that are kept for one row."""
    inputs, inside, back = 0, [], 0
    for block in network.blocks(*size):
        width = block.inputs
        if block.kind == "residual":
            inputs += block.tokens * width
            inside.append(_RESBLOCK * block.tokens * (width + block.outputs))
        elif block.kind == "transformer":
            inputs += block.tokens * width * (1 + _BANK * block.depth)
            inside.append((_TRANSFORMER * block.tokens + _TEXT) * width * block.depth)
            back = max(back, _BACK * block.tokens * width)
        elif isinstance(network, DiT):
            inputs += (block.tokens + _BANK * (block.tokens - network.joint_text)) * width
            inside.append(_JOINT * block.tokens * width)
            back = max(back, _BACK * block.tokens * width)
    return inputs + max(inside) + back if checkpointing else sum(inside)
