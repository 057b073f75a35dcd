"""Selects the adapter for a kind of network. A new kind is a new file beside unet.py."""

from __future__ import annotations

import torch

from .unet import UNet

Network = UNet


def network_of(module: torch.nn.Module) -> Network:
    """The adapter for the host's `diffusion_model`. It walks the module tree: call it once per run.

    Raises ValueError for an unsupported network.
    """
    return UNet(module)
