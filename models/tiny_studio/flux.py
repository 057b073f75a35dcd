"""Tiny Flux: a network of Flux.1's kind for the Tiny Studio's VAE and text encoder, of the host's classes.

6.2M parameters on 8x8 tokens. It has no embedding of guidance and no pooled text. The weights beside this
file had 4,029 steps of 64 scenes (`lab/tiny_studio/train_flow.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import Flux

from ..operations import disable_weight_init
from . import networks
from .studio import make_model, read_weights

FILE = Path(__file__).with_name("tiny_flux.safetensors")
BRIDGE = Path(__file__).with_name("flux_bridge.safetensors")  # train_bridge.py's flux_edit_queries
TOKENS = 32  # of a text, with its start mark; the longest caption of its training has 23
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
    """The host's Flux.1, which reads the first TOKENS tokens of a text."""

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The host's conditions. Raises ValueError for a text with more tokens."""
        text = kwargs.get("cross_attn")
        if text is not None:
            if text[:, TOKENS:].any():  # what follows a text's end is zero
                raise ValueError(
                    f"the description has more than {TOKENS - 1} tokens (about as many words), and the "
                    "Tiny Flux reads no more: shorten it"
                )
            kwargs["cross_attn"] = text[:, :TOKENS]
        return super().extra_conds(**kwargs)


class TinyFlux(comfy.supported_models.Flux):
    """Flux.1's family with the Tiny Studio's latents, not distilled."""

    unet_config: ClassVar[dict] = {}
    latent_format = comfy.latent_formats.SD15
    sampling_settings: ClassVar[dict] = {"shift": 1.0, "multiplier": 1.0}

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


def load_model(
    path: Path = FILE, disable_dynamic: bool = False, dtype: torch.dtype | None = None
) -> comfy.model_patcher.ModelPatcher:
    """The network, ready for any sampler of the host. dtype: of its weights, None for the host's choice."""
    config = TinyFlux(dict(FLUX))
    patcher, dtype = make_model(config, read_weights(path), disable_dynamic, dtype)
    patcher.cached_patcher_init = (partial(load_model, dtype=dtype), (path,))
    return patcher
