"""Cuts the part of an image that is edited, in a size that a model takes, and puts the edited part back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MULTIPLE = 64  # sides of a crop, in pixels: every grid of a UNet then divides them


@dataclass(frozen=True, eq=False)
class Crop:
    """What `stitch` needs to put an edited crop back.

    image: the whole image, [images, height, width, 3], 0 to 1.
    mask: the edit region in it, [masks, height, width], 0 to 1; None for the whole image.
    box: top, left, height and width of the crop in it, in pixels.
    """

    image: torch.Tensor
    mask: torch.Tensor | None
    box: tuple[int, int, int, int]


def crop(
    image: torch.Tensor, mask: torch.Tensor | None, side: int, context: float
) -> tuple[torch.Tensor, torch.Tensor, Crop]:
    """The crop, [images, height, width, 3]; its mask, [masks, height, width]; and what puts it back.

    The crop is the box around the mask, `context` times as large where the image has room. It is scaled to
    about side x side pixels, both sides multiples of MULTIPLE.

    image: [images, height, width, 3], 0 to 1.
    mask: [masks, height, width], 0 to 1. All 0, or None: the whole image, and a mask of ones.
    side: in pixels.
    context: from 1.

    Raises ValueError for a mask that is neither all 0 nor of the image's size, and for another number of
    masks than one or one for each image.
    """
    height, width = image.shape[1:3]
    if mask is not None and not mask.any():
        mask = None  # Load Image gives a small one of zeros if nothing is painted
    if mask is None:
        box, region = (0, 0, height, width), torch.ones(1, height, width)
    else:
        if mask.shape[1:] != image.shape[1:3]:
            raise ValueError(
                f"mask is {mask.shape[2]}x{mask.shape[1]} but image is {width}x{height}: draw it on this "
                "image"
            )
        if len(mask) not in (1, len(image)):
            raise ValueError(
                f"mask holds {len(mask)} masks but image {len(image)} images: give one, or one for each"
            )
        box, region = _box(mask, context), mask
    top, left, rows, columns = box
    size = _size(rows, columns, side)
    cut = (slice(top, top + rows), slice(left, left + columns))
    scaled = _scale(image[:, cut[0], cut[1]], size)
    return scaled, _scale_mask(region[:, cut[0], cut[1]], size), Crop(image, mask, box)


def stitch(cut: Crop, edited: torch.Tensor, mask: torch.Tensor | None, blend: int) -> torch.Tensor:
    """The whole image with the edited crop in it, [images, height, width, 3]. Where the mask is 0 every pixel
    is the source's, bit for bit.

    edited: the edited crop, [images, height, width, 3], 0 to 1, in any size.
    mask: of the edited crop, [masks, height, width], 0 to 1; None for the crop's own.
    blend: width in pixels of the edge, inside the mask, over which source and edit mix.

    Raises ValueError for another number of edited images or masks than in the crop, where not one.
    """
    top, left, rows, columns = cut.box
    images = max(len(cut.image), len(edited))
    for name, found in (("edited", len(edited)), ("mask", 1 if mask is None else len(mask))):
        if found not in (1, images) or len(cut.image) not in (1, images):
            raise ValueError(
                f"{name} holds {found} but the crop {len(cut.image)} images: give one, or one for each"
            )
    inner = (slice(top, top + rows), slice(left, left + columns))
    if mask is None:
        whole = torch.ones(1, *cut.image.shape[1:3]) if cut.mask is None else cut.mask
        region = whole[:, inner[0], inner[1]]
    else:
        region = _scale_mask(mask, (rows, columns))
        if cut.mask is not None:
            region = torch.minimum(region, cut.mask[:, inner[0], inner[1]])
    height, width = cut.image.shape[1:3]
    open_sides = (left > 0, left + columns < width, top > 0, top + rows < height)
    weight = _inwards(region, blend, open_sides)[..., None]
    result = cut.image.expand(images, -1, -1, -1).clone()
    source = result[:, inner[0], inner[1]]
    result[:, inner[0], inner[1]] = torch.where(
        weight > 0, source + weight * (_scale(edited, (rows, columns)) - source), source
    )
    return result


def _box(mask: torch.Tensor, context: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of the box around every mask, `context` times as large."""
    sides = []
    for along, limit in ((2, mask.shape[1]), (1, mask.shape[2])):
        places = (mask > 0).any(dim=0).any(dim=along - 1).nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1]) + 1
        length = min(limit, math.ceil((last - first) * context))
        start = min(max(0, (first + last - length) // 2), limit - length)
        sides.append((start, length))
    (top, rows), (left, columns) = sides
    return top, left, rows, columns


def _size(rows: int, columns: int, side: int) -> tuple[int, int]:
    """Height and width of about side x side pixels in the box's shape."""
    ratio = math.sqrt(rows / columns)
    height, width = (max(MULTIPLE, round(side * part / MULTIPLE) * MULTIPLE) for part in (ratio, 1 / ratio))
    return height, width


def _scale(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[images, height, width, channels] in another size."""
    if images.shape[1:3] == size:
        return images
    moved = torch.nn.functional.interpolate(
        images.movedim(-1, 1), size, mode="bilinear", align_corners=False, antialias=True
    )
    return moved.movedim(1, -1).clamp(0, 1)


def _scale_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[masks, height, width] in another size; 0 and 1 stay exact."""
    scaled = _scale(mask[..., None], size)[..., 0]
    whole = scaled.round()
    return torch.where((scaled - whole).abs() < 1e-4, whole, scaled)


def _inwards(mask: torch.Tensor, blend: int, open_sides: tuple[bool, bool, bool, bool]) -> torch.Tensor:
    """The mask with an edge that rises over `blend` pixels inwards; 0 where the mask is 0.

    open_sides: whether the image goes on to the left, right, top and bottom of the mask.
    """
    left, right, top, bottom = map(int, open_sides)
    eroded = torch.nn.functional.pad(mask, (left, right, top, bottom))
    total = eroded.clone()
    for _ in range(blend):
        eroded = -torch.nn.functional.max_pool2d(-eroded[:, None], 3, 1, 1)[:, 0]
        total += eroded
    total = total[:, top : total.shape[1] - bottom, left : total.shape[2] - right]
    return total / (blend + 1)
