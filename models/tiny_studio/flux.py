"""Tiny Flux: a network of Flux.1's kind for the Tiny Studio's VAE and text encoder, of the host's classes.

6.2M parameters on 8x8 tokens. It has no embedding of guidance and no pooled text, and reads 32 tokens of
text. The weights beside this file had 4,029 steps of 64 scenes (`train_flow`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import safetensors.torch
import torch
from comfy.ldm.flux.model import Flux
from comfy.supported_models import FluxSchnell

from ...models.operations import disable_weight_init
from ...models.tiny_studio import networks

FILE = Path(__file__).with_name("tiny_flux.safetensors")
TOKENS = 32
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "guidance_embed": False,
    "hidden_size": 192,
    "num_heads": 6,
    "axes_dim": [4, 14, 14],
    "depth": 2,
    "depth_single_blocks": 6,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "context_in_dim": networks.TEXT["hidden_size"],
    "vec_in_dim": None,
    "qkv_bias": True,
    "theta": 100,
    "txt_ids_dims": [],
}
# What gates a block's result or the network's: they start at zero (adaLN-Zero, arXiv 2212.09748).
_GATES = ("mod.lin", "modulation.lin", "final_layer.linear", "final_layer.adaLN_modulation.1")


class TinyFluxModel(comfy.model_base.Flux):
    """The host's Flux.1, which reads the first tokens of a text: no caption has more."""

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The host's conditions."""
        text = kwargs.get("cross_attn")
        return super().extra_conds(**{**kwargs, "cross_attn": None if text is None else text[:, :TOKENS]})


class TinyFlux(FluxSchnell):
    """Flux.1 schnell's family with the Tiny Studio's latents."""

    unet_config: dict = {}  # noqa: RUF012 (the host's own form)
    latent_format = comfy.latent_formats.SD15
    sampling_settings: dict = {"shift": 1.0, "multiplier": 1.0}  # noqa: RUF012

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> TinyFluxModel:
        return TinyFluxModel(self, model_type=comfy.model_base.ModelType.FLOW, device=device)


def new_network() -> Flux:
    """A network that predicts zero: its gates start at zero."""
    network = networks.initialise(Flux(**FLUX, operations=disable_weight_init))
    for name, layer in network.named_modules():
        if name.endswith(_GATES):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.RMSNorm):
            torch.nn.init.ones_(layer.weight)
    return network


def load_model(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """MODEL from packed weights, in float32."""
    config = TinyFlux({})
    config.unet_config = {**FLUX, "dtype": torch.float32}
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    management = comfy.model_management
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    state = {name: weight.float() for name, weight in safetensors.torch.load_file(path).items()}
    model.diffusion_model.load_state_dict(state, assign=patcher.is_dynamic())
    return patcher
