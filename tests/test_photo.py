"""Crop for Edit and Stitch Edit: the part of a photo that is edited, in the model's size, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host import Host


def photo(height: int = 300, width: int = 500, images: int = 1) -> torch.Tensor:
    return torch.rand(images, height, width, 3, generator=torch.Generator().manual_seed(1))


def painted(top: int, left: int, height: int, width: int, size: tuple[int, int] = (300, 500)) -> torch.Tensor:
    mask = torch.zeros(1, *size)
    mask[:, top : top + height, left : left + width] = 1
    return mask


def cut(host: Host, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    image, mask, crop = host.execute("DescEditCrop", **inputs)
    return image, mask, crop


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 64, 64)], ids=["none", "nothing painted"])
def test_without_a_mask(host: Host, mask: torch.Tensor | None) -> None:
    """Protects: without a mask, or with Load Image's if nothing is painted, the whole photo is fitted: about
    side x side pixels in its own shape, and comes back in its own size.
    """
    image, region, crop = cut(host, image=photo(), mask=mask, side=256, context=1.5)
    assert image.shape == (1, 192, 320, 3)
    assert torch.equal(region, torch.ones(1, 192, 320))
    (whole,) = host.execute("DescEditStitch", crop=crop, edited=torch.zeros_like(image), blend=8)
    assert torch.equal(whole, torch.zeros(1, 300, 500, 3))


@pytest.mark.parametrize(
    ("box", "context", "expected"),
    [
        ((100, 200, 40, 60), 2.0, (80, 170, 80, 120)),
        ((100, 200, 40, 60), 1.0, (100, 200, 40, 60)),
        ((0, 440, 40, 60), 2.0, (0, 380, 80, 120)),
        ((10, 20, 200, 60), 10.0, (0, 0, 300, 500)),
    ],
    ids=["twice", "box alone", "corner", "all there is"],
)
def test_box(host: Host, box: Any, context: float, expected: tuple[int, int, int, int]) -> None:
    """Protects: the crop is the mask's box, `context` times as large, moved into the photo at its border."""
    _, _, crop = cut(host, image=photo(), mask=painted(*box), side=128, context=context)
    assert crop.box == expected


@pytest.mark.parametrize("blend", [0, 8, 64])
def test_outside_the_mask_every_pixel_stays(host: Host, blend: int) -> None:
    """Protects: after the edit a pixel outside the mask has the bits it had, at the photo's own size; inside
    the edit is there, rising linearly over `blend` pixels from the mask's edge.
    """
    image, mask = photo(), painted(60, 100, 150, 200)
    small, region, crop = cut(host, image=image, mask=mask, side=128, context=1.5)
    assert small.shape[1] % 64 == small.shape[2] % 64 == 0
    assert region.shape == small.shape[:3]
    assert set(region.unique().tolist()) >= {0.0, 1.0}
    (whole,) = host.execute("DescEditStitch", crop=crop, edited=torch.ones_like(small), blend=blend)
    outside = mask[0] == 0
    assert torch.equal(whole[0][outside], image[0][outside])
    for depth in range(0, 75, 5):
        share = min(1.0, (depth + 1) / (blend + 1))
        old = image[0, 60 + depth, 200]
        torch.testing.assert_close(whole[0, 60 + depth, 200], old + share * (1 - old))


def test_mask_of_the_edit(host: Host) -> None:
    """Protects: a mask of the crop, as UnifyEdit gives it, limits what is put back, and never widens it."""
    image, mask = photo(), painted(60, 100, 150, 200)
    small, _, crop = cut(host, image=image, mask=mask, side=128, context=1.5)
    half = torch.ones(small.shape[:3])
    half[:, :, : small.shape[2] // 2] = 0
    (whole,) = host.execute("DescEditStitch", crop=crop, edited=torch.ones_like(small), mask=half, blend=0)
    _, left, _, width = crop.box
    middle = left + width // 2
    assert torch.equal(whole[:, :, : middle - 4], image[:, :, : middle - 4])
    assert torch.equal(whole[0][mask[0] == 0], image[0][mask[0] == 0])
    assert float(whole[0, 60:210, middle + 4 : 300].min()) == 1


def test_batches(host: Host) -> None:
    """Protects: several photos in one box around all their masks, and several edits of one photo."""
    masks = torch.cat([painted(60, 100, 20, 20), painted(200, 300, 20, 20)])
    small, region, crop = cut(host, image=photo(images=2), mask=masks, side=128, context=1.0)
    assert len(small) == len(region) == 2
    assert crop.box == (60, 100, 160, 220)
    one, _, crop = cut(host, image=photo(), mask=masks[:1], side=128, context=1.0)
    (several,) = host.execute("DescEditStitch", crop=crop, edited=one.repeat(3, 1, 1, 1), blend=0)
    assert len(several) == 3


def test_refusals(host: Host) -> None:
    """Protects: a mask of another size, and numbers that do not fit, are named."""
    with pytest.raises(ValueError, match="Crop for Edit: mask is 64x64 but image is 500x300: draw it on"):
        cut(host, image=photo(), mask=torch.ones(1, 64, 64), side=128, context=1.5)
    with pytest.raises(ValueError, match="mask holds 2 masks but image 3 images"):
        cut(host, image=photo(images=3), mask=torch.ones(2, 300, 500), side=128, context=1.5)
    small, _, crop = cut(host, image=photo(images=2), side=128, context=1.5)
    with pytest.raises(ValueError, match="Stitch Edit: edited holds 3 but the crop 2 images"):
        host.execute("DescEditStitch", crop=crop, edited=torch.cat([small, small[:1]]), blend=0)
