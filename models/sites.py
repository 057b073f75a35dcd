"""Where a UNet attends: its transformer blocks, by the names the host gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample

SiteKey = tuple[str, int, int]

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:\d+\.)?transformer_blocks\.(\d+)")


@dataclass(frozen=True)
class Site:
    """One transformer block of a UNet, with its self- and cross-attention.

    key: (block, number, depth) as the host names it in `extra_options`, such as ("output", 3, 0).
    level: how many times the latent has been halved before it. width: channels of a token. path: where the
    block is in the UNet's module tree.
    """

    key: SiteKey
    level: int
    width: int
    path: str

    @property
    def name(self) -> str:
        """The key as bridge files write it, such as `output.3.0`."""
        return ".".join(map(str, self.key))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens here, for a latent of `height` x `width`."""
        for _ in range(self.level):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width


def find_sites(unet: torch.nn.Module) -> tuple[Site, ...]:
    """Every site of a UNet in the order in which they run, read off its module tree.

    Raises ValueError, if the network is not a UNet of Stable Diffusion's kind with
    cross-attention.
    """
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"needs a UNet with cross-attention (SD1.5, SD2.x, SDXL), but got {type(unet).__name__}"
        )
    sites, level = [], 0
    for name, module in unet.named_modules():
        if isinstance(module, (Downsample, Upsample)):
            level += 1 if isinstance(module, Downsample) else -1
        elif isinstance(module, BasicTransformerBlock) and (match := _BLOCK.fullmatch(name)):
            block, number, depth = match.groups()
            block = block.partition("_")[0]
            if module.attn2 is not None and not module.disable_self_attn:
                key = (block, 0 if block == "middle" else int(number), int(depth))
                sites.append(Site(key, level, module.n_heads * module.d_head, name))
    if not sites:
        raise ValueError("this model's UNet has no self- and cross-attention: use SD1.5, SD2.x or SDXL")
    return tuple(sites)
