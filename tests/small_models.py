"""Small random models for tests: SD1.5's topology at reduced width, through the host's own loader.

`prepare` of host.py must have run before this module is imported; conftest sees to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import memory_modes
import small_dits
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

CONTEXT_WIDTH = 32
TEXT_TOKENS = 77
LATENT_SIZE = 16
BRANCH_ENDS = ("out_layers.3.weight", "to_out.0.weight", "net.2.weight", "proj_out.weight", "out.2.weight")
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT_WIDTH,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}


class _SmallSD15(comfy.supported_models.SD15):
    unet_config: ClassVar = {
        **comfy.supported_models.SD15.unet_config,
        "context_dim": CONTEXT_WIDTH,
        "model_channels": 32,
    }
    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1}


class _SmallSDXL(comfy.supported_models.SDXL):
    unet_config: ClassVar = {
        "context_dim": CONTEXT_WIDTH,
        "model_channels": 32,
        "use_linear_in_transformer": True,
        "adm_in_channels": CONTEXT_WIDTH + 6 * 256,
    }
    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1}


SDXL_LAYOUT = {
    "channel_mult": (1, 2),
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 3,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": CONTEXT_WIDTH + 6 * 256,
}


def unet_state_dict(
    seed: int = 0, dtype: torch.dtype = torch.float32, layout: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Random weights of about 1.7M parameters, lively enough that text and place change the output."""
    with memory_modes.resident():  # elsewhere it would have no shapes yet
        unet = UNetModel(**{**UNET, **(layout or {})}, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in unet.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            gain = 0.3 if name.endswith(BRANCH_ENDS) else 1.0  # a random net at full gain is chaotic
            weights[name] = gain * noise / weight[0].numel() ** 0.5
        else:
            weights[name] = 0.05 * noise + float(name.endswith("weight"))
        weights[name] = weights[name].to(dtype)
    return weights


def small_unet(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """A ModelPatcher around a random UNet with self- and cross-attention at 16x16, 8x8 and 4x4 for 16x16
    latents; `layout` changes entries of UNET.

    It is of SD1.5's family, or of SDXL's where the layout has pooled text.

    Loaded under inference mode, as the executor loads models, so its weights are inference tensors.
    Half-precision weights stay half and are cast to float32 layer by layer, which is what the host does on a
    CPU.
    """
    family: Any = _SmallSDXL if layout and "adm_in_channels" in layout else _SmallSD15
    comfy.supported_models.models.insert(0, family)  # the loader finds model classes only in this list
    try:
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model_state_dict(
                unet_state_dict(seed, dtype, layout),
                model_options={"dtype": dtype},
                disable_dynamic=disable_dynamic,
            )
    finally:
        comfy.supported_models.models.remove(family)
    assert model is not None
    model.cached_patcher_init = (small_unet, (seed, dtype, layout))
    return model


# A random network of each kind, by a function without arguments.
KINDS: dict[str, Callable[[], Any]] = {
    "SD1.5": small_unet,
    "SDXL": lambda: small_unet(layout=SDXL_LAYOUT),
    **{name: partial(small_dits.small_dit, name) for name in (*small_dits.FAMILIES, *small_dits.OTHERS)},
}


def loaded(model: Any) -> Any:
    """The ModelPatcher with its weights on its device, for tests that call its network by themselves."""
    with torch.inference_mode():
        comfy.model_management.load_model_gpu(model)
    return model


def conditioning(seed: int = 0, tokens: int = TEXT_TOKENS, batch: int = 1) -> list[list[Any]]:
    """A random CONDITIONING as CLIPTextEncode would make it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, tokens, CONTEXT_WIDTH, generator=generator)
    return [[text, {"pooled_output": text.mean(1)}]]


def latent(
    seed: int = 0, batch: int = 1, size: tuple[int, int] = (LATENT_SIZE, LATENT_SIZE), model: Any = None
) -> torch.Tensor:
    """A random LATENT's samples, [batch, channels, *size], in the scale that the VAE gives: SD1.5's, or that
    of a MODEL.
    """
    generator = torch.Generator().manual_seed(seed)
    if model is None:
        return torch.randn(batch, 4, *size, generator=generator) / 0.18215
    latents = model.model.latent_format
    shape = batch, latents.latent_channels, *[1] * (latents.latent_dimensions - 2), *size
    return model.model.process_latent_out(torch.randn(*shape, generator=generator))


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything of a ModelPatcher that a run must leave alone, comparable with ==. On a card the host moves
    weights, so that only on a CPU they must stay where they are.
    """
    stays = model.load_device.type == "cpu"
    weights = {
        name: (
            weight.cpu().sum(dtype=torch.float64).item(),
            weight.data_ptr() if stays else None,
            weight.is_inference(),
        )
        for name, weight in model.model.state_dict().items()
    }
    return (
        weights,
        dict(model.patches),
        repr(model.model_options),
        repr(model.wrappers),
        repr(model.callbacks),
    )
