"""What UnifyEdit's gradients take of memory, so that the host can make room for it.

Counted is what is there at once when it is most, for a forward whose weights have no gradient:

- What autograd keeps. Of a ResBlock: the inputs of both norms, activations and convolutions. Of a
  transformer: its input, those of its convolutions, and of each of its blocks 21 times its tokens (inputs of
  three norms; queries, keys, values and results of attention; 12 for the gated feed-forward). With
  checkpointing: the layers' inputs, and the recorded queries and keys.
- The source's queries and keys.
- Then either a loss's derivatives by queries and keys, in float32, with one piece of a map: its
  probabilities, the source's, their difference, and two more for its gradient. Or those derivatives in the
  UNet's dtype, what is on the way back through one block of a transformer, and, with checkpointing, the
  inside of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample

from ...models.sites import Site
from ..attention.recorder import PIECE

TEXT_TOKENS = 77
_BLOCK, _BACK, _MAPS = 21, 16, 5


def backward_bytes(
    unet: torch.nn.Module,
    self_sites: Sequence[Site],
    cross_sites: Sequence[Site],
    shape: Sequence[int],
    itemsize: int,
    checkpoint: bool,
) -> int:
    """Bytes that the graph from a latent to the recorded attentions, their losses and gradients take.

    shape: the latent's, [rows, channels, height, width]. itemsize: bytes of a number in the UNet. checkpoint:
    with every layer's inside computed again, one at a time.
    """
    rows, _, height, width = shape
    paths = {site.path for site in (*self_sites, *cross_sites)}
    if not paths:
        return 0
    kept, inside, back = _graph(unet, paths, height, width)
    structure = 2 * sum(math.prod(site.grid(height, width)) * site.width for site in self_sites)
    words = sum(math.prod(site.grid(height, width)) * site.width for site in cross_sites)
    kept += structure + (structure + words if checkpoint else sum(inside))
    back += max(inside) if checkpoint else 0
    slopes = rows * max(structure, words)
    piece = min(PIECE, rows * max(_map_size(unet, self_sites, cross_sites, height, width)))
    return rows * kept * itemsize + max(4 * (slopes + _MAPS * piece), itemsize * (slopes + rows * back))


def _map_size(
    unet: torch.nn.Module, self_sites: Sequence[Site], cross_sites: Sequence[Site], height: int, width: int
) -> list[int]:
    """Probabilities of a row at each site."""
    found = []
    for sites, keys in ((self_sites, None), (cross_sites, TEXT_TOKENS)):
        for site in sites:
            tokens = math.prod(site.grid(height, width))
            found.append(unet.get_submodule(site.path).n_heads * tokens * (keys or tokens))
    return found


def _graph(unet: torch.nn.Module, paths: set[str], height: int, width: int) -> tuple[int, list[int], int]:
    """Numbers of a row up to the last of `paths`: what autograd keeps of the layers' inputs, and of the
    inside of each layer; and what is on the way back through the largest block of a transformer.
    """
    grid, pending, kept, inside, back = (height, width), set(paths), 0, [], 0
    for name, module in unet.named_modules():
        tokens = math.prod(grid)
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
            around = 0 if module.use_linear else 2
            inside.append(tokens * inner * (_BLOCK * len(module.transformer_blocks) + around))
            back = max(back, tokens * inner * _BACK)
            pending -= {path for path in pending if path.startswith(f"{name}.")}
            if not pending:
                break
    return kept, inside, back


def copied_bytes(unet: torch.nn.Module, sites: Sequence[Site], itemsize: int, checkpoint: bool) -> int:
    """Bytes of the weights that a gradient keeps copies of where the host streams them (`gradient`): of every
    layer up to the last of `sites`, or of the largest one, where layers are computed again one at a time.
    """
    pending, layers = {site.path for site in sites}, [0]
    for name, module in unet.named_modules():
        if not pending:
            break
        if isinstance(module, (ResBlock, SpatialTransformer, Downsample, Upsample)):
            layers.append(sum(weight.numel() for weight in module.parameters()))
            pending -= {path for path in pending if path.startswith(f"{name}.")}
    return itemsize * (max(layers) if checkpoint else sum(layers))
