"""Memory of UnifyEdit's gradients on SDXL, estimated on SDXL's own module tree."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...patches.attention.layers import structure_layers, word_layers
from ...patches.attention.networks import unet_of
from ...patches.unify.memory import backward_bytes
from ...patches.unify.settings import UnifyOptions

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": (1, 2, 4),
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "legacy": False,
}


def unet() -> Any:
    """SDXL's UNet on torch's meta device: layers and shapes without values."""
    return UNetModel(**UNET, device="meta", operations=comfy.ops.disable_weight_init)


def gradient_gib(checkpoint: bool, side: int = 128) -> float:
    """GiB beside the stock run for an edit of one image with the sampler's default layers in half precision.

    side: the latent's, 128 for 1024x1024.
    """
    network = unet_of(unet(), "UnifyEdit")
    layers = network.layers.values()
    structure = structure_layers(layers, side, side, UnifyOptions.max_self_attn_res)
    words = word_layers(layers, side, side, UnifyOptions.cross_attn_res)
    size = torch.float16.itemsize
    return backward_bytes(network, structure, words, (1, 4, side, side), size, checkpoint) / 2**30
