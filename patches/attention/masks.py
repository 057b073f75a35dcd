"""Resizes masks from the image to the grids of the attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from einops import rearrange
from kornia.geometry.transform import resize

from .layers import AttentionLayer


def check_mask(mask: torch.Tensor, rows: int, height: int, width: int) -> None:
    """Raise ValueError unless `mask` fits `rows` images of `height` x `width` pixels.

    Another size is allowed if its aspect ratio is the image's, to within a hundredth or the 8 pixels that a
    VAE crops.
    """
    images, mask_height, mask_width = mask.shape
    if images not in (1, rows):
        raise ValueError(f"mask has {images} images but {rows} are edited: give one mask, or one for each")
    close = abs(mask_width * height - mask_height * width) <= 0.01 * mask_height * width
    cropped = 0 <= mask_width - width < 8 and 0 <= mask_height - height < 8
    if not (close or cropped):
        raise ValueError(
            f"mask is {mask_width}x{mask_height} but the image is {width}x{height}: "
            "draw it on the image, or resize it to the image's size"
        )


def layer_masks(
    mask: torch.Tensor | None,
    layers: Iterable[AttentionLayer],
    height: int,
    width: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The mask on the places of every layer's maps: a place's value is the fraction of its area that the mask
    covers.

    mask: [rows or 1, any height, any width], 0 to 1, or None for the whole image.
    height, width: the latent's.

    Returns [rows or 1, places] by layer, on `device`; layers of the same grid have the same tensor.
    """
    mask = torch.ones(1, height, width) if mask is None else mask
    mask = rearrange(mask.to(device), "b h w -> b 1 h w")

    @cache
    def on(grid: tuple[int, int]) -> torch.Tensor:
        return rearrange(resize(mask, grid, interpolation="area"), "b 1 h w -> b (h w)")

    return {layer.key: on(layer.places(height, width)) for layer in layers}
