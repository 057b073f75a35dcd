"""Selects the adapter for a kind of network. A new kind is a new file beside them."""

from __future__ import annotations

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

from .flux import FluxDiT
from .mmdit import SD3
from .qwen_image import QwenImage
from .unet import UNet

# Those whose attention the recorder can read too.
Readable = UNet | FluxDiT
Network = Readable | SD3 | QwenImage


def network_of(module: torch.nn.Module) -> Network:
    """The adapter for the host's `diffusion_model`. It walks the module tree: call it once per run.

    Raises ValueError for an unsupported network.
    """
    if isinstance(module, UNetModel):
        return UNet(module)
    if isinstance(module, Flux | Chroma):
        return FluxDiT(module)
    if isinstance(module, MMDiT):
        return SD3(module)
    if isinstance(module, QwenImageTransformer2DModel):
        return QwenImage(module)
    raise ValueError(
        "needs a UNet with cross-attention (SD1.5, SD2.x, SDXL), a DiT of Flux's kind (Flux.1, Flux.2, "
        f"Chroma), SD3, SD3.5 or Qwen-Image, but got {type(module).__name__}"
    )


def readable_of(module: torch.nn.Module) -> Readable:
    """The same, for a method that reads attention.

    Raises ValueError for an unsupported network.
    """
    network = network_of(module)
    if not isinstance(network, Readable):
        raise ValueError(
            f"{network.name} does not run here yet, only with an attention bridge, dual guidance and in "
            "training: use SD1.x, SD2.x, SDXL, Flux.1, Flux.2 or Chroma"
        )
    return network


def unet_of(module: torch.nn.Module, method: str) -> UNet:
    """The same, for a method that runs on UNets alone.

    method: its name, for the message.

    Raises ValueError for an unsupported network.
    """
    network = network_of(module)
    if not isinstance(network, UNet):
        raise ValueError(f"{method} does not run on {network.name} yet: use SD1.x, SD2.x or SDXL")
    return network
