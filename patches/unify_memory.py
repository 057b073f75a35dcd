"""What a backward pass to the latent takes of memory, so that the host can make room for it.

Counted is what autograd keeps of a forward whose weights have no gradient: of a ResBlock the inputs of both
norms, activations and convolutions; of a transformer 24 times its tokens (two norms and two projections
around it, queries, keys, values and results of attention, and 12 for the gated feed-forward); of a recorded
attention three times its probabilities in float32 (its own, the source's, and their difference).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample

from ..models.sites import Site

TEXT_TOKENS = 77
_TRANSFORMER, _PROBABILITIES = 24, 3


def backward_bytes(
    unet: torch.nn.Module,
    self_sites: Sequence[Site],
    cross_sites: Sequence[Site],
    shape: Sequence[int],
    itemsize: int,
    checkpoint: bool,
) -> int:
    """Bytes that the graph from a latent to the recorded attentions holds.

    shape: the latent's, [rows, channels, height, width]. itemsize: bytes of a number in the UNet. checkpoint:
    with every layer's inside computed again, one at a time.
    """
    rows, _, height, width = shape
    paths = {site.path for site in (*self_sites, *cross_sites)}
    if not paths:
        return 0
    grid, pending, kept, inside = (height, width), set(paths), 0, [0]
    for name, module in unet.named_modules():
        tokens = grid[0] * grid[1]
        if isinstance(module, Downsample):
            grid = tuple((side + 1) // 2 for side in grid)
        elif isinstance(module, Upsample):
            grid = tuple(side * 2 for side in grid)
        elif isinstance(module, ResBlock):
            kept += tokens * module.channels
            inside.append(tokens * (2 * module.channels + 3 * module.out_channels))
        elif isinstance(module, SpatialTransformer):
            inner = module.transformer_blocks[0].n_heads * module.transformer_blocks[0].d_head
            kept += tokens * inner
            inside.append(tokens * inner * _TRANSFORMER * len(module.transformer_blocks))
            pending -= {path for path in pending if path.startswith(f"{name}.")}
            if not pending:
                break
    numbers = kept + (max(inside) if checkpoint else sum(inside))
    probabilities, queries = 0, 0
    for sites, keys in ((self_sites, None), (cross_sites, TEXT_TOKENS)):
        for site in sites:
            rows_here, columns = site.grid(height, width)
            tokens = rows_here * columns
            heads = unet.get_submodule(site.path).n_heads
            probabilities += _PROBABILITIES * heads * tokens * (keys or tokens)
            queries += tokens * site.width * (1 if keys else 2)
    return rows * (numbers * itemsize + (probabilities + queries) * 4)
