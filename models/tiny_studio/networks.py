"""The three networks of the Tiny Studio, made of the host's classes: SD1.5's layout at reduced width."""

from __future__ import annotations

from typing import Any, TypeVar

import comfy.ops
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..operations import disable_weight_init

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 128,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}


class PixelBlocks(comfy.ops.disable_weight_init.Conv2d):
    """The decoder's last convolution, which produces a block of 4x4 pixels per position.

    The host's group normalisation has 32 groups. With few channels it removes colour, and layers with many
    channels are slow at full resolution.
    """

    def __init__(self, channels: int, colours: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(channels, colours * 16, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.pixel_shuffle(super().forward(*args, **kwargs), 4)


_IMAGE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "attn_resolutions": [],
    "dropout": 0.0,
}
VAE = {
    "ddconfig": {**_IMAGE, "ch": 96, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 0},
    "decoder_ddconfig": {
        **_IMAGE,
        "ch": 128,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "conv_out_op": PixelBlocks,
    },
    "embed_dim": 4,
}
LATENT_SCALE = 0.18215  # comfy.latent_formats.SD15


_Network = TypeVar("_Network", bound=torch.nn.Module)
# torch's own classes: the host's `reset_parameters` does nothing.
_LAYERS: tuple[Any, ...] = (
    torch.nn.Linear,
    torch.nn.Conv2d,
    torch.nn.GroupNorm,
    torch.nn.LayerNorm,
    torch.nn.Embedding,
)


def initialise(module: _Network) -> _Network:
    """Give every layer torch's default initial values: the host creates its layers empty, for loading."""
    for layer in module.modules():
        for kind in _LAYERS:
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
    return module


def _zero(module: torch.nn.Module, *endings: str) -> None:
    for name, layer in module.named_modules():
        if name.endswith(endings):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)


def new_vae() -> AutoencoderKL:
    """A VAE whose residual branches start at zero."""
    vae = initialise(AutoencoderKL(**VAE))
    _zero(vae, "conv2", "proj_out")
    return vae


def new_unet() -> UNetModel:
    """A UNet whose residual branches start at zero, as SD's do."""
    unet = initialise(UNetModel(**UNET, operations=disable_weight_init))
    _zero(unet, "out_layers.3", "proj_out")
    _zero(unet.get_submodule("out"), "2")
    return unet


def new_text_model() -> CLIPTextModel:
    """A CLIP text model with distinct token embeddings of unit variance."""
    return initialise(CLIPTextModel(TEXT, torch.float32, "cpu", disable_weight_init))
