"""The kinds of network that the methods work in. Another kind is another file beside unet.py."""

from __future__ import annotations

import torch

from .unet import UNet

Network = UNet


def network_of(module: torch.nn.Module) -> Network:
    """What the methods ask of the host's `diffusion_model`. It walks the module tree: call it once a run.

    Raises ValueError for a network that no method works in.
    """
    return UNet(module)
