"""The metrics: against torchmetrics on the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from host import Host
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


@pytest.fixture(scope="module")
def metrics(host: Host) -> Any:
    """The module."""
    return host.pack_module("metrics.image")


def pictures(seed: int = 0, images: int = 2, size: tuple[int, int] = (48, 56)) -> tuple[torch.Tensor, ...]:
    """A smooth random picture and the same with noise, IMAGEs."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(images, 3, 6, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, size, mode="bilinear").permute(0, 2, 3, 1)
    return smooth, (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def channels_first(images: torch.Tensor) -> torch.Tensor:
    """As torchmetrics, lpips and transformers take them."""
    return images.permute(0, 3, 1, 2)


def close(found: torch.Tensor, expected: Any) -> None:
    """Equal to 1e-4."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=1e-4)


def test_whole_image(metrics: Any) -> None:
    """Protects: L1, L2, PSNR and SSIM, image by image, against plain formulas and torchmetrics."""
    source, edited = pictures()
    found = metrics.measure(edited, source)
    difference = (edited - source).double().numpy()
    close(found["l1"], np.abs(difference).mean(axis=(1, 2, 3)))
    close(found["l2"], (difference**2).mean(axis=(1, 2, 3)))
    for number in range(len(source)):
        first, second = (channels_first(images[number : number + 1]) for images in (edited, source))
        close(found["psnr"][number], peak_signal_noise_ratio(first, second, data_range=1.0))
        close(found["ssim"][number], structural_similarity_index_measure(first, second, data_range=1.0))


def test_regions(metrics: Any) -> None:
    """Protects: inside and outside a mask count only that region's pixels, and SSIM's window does not see
    across its edge.
    """
    source, edited = pictures()
    mask = torch.zeros(1, 48, 56)
    mask[:, 8:30, 20:44] = 1
    found = metrics.measure(edited, source, mask)
    difference = (edited - source).double().numpy()
    for name, region in (("inside", mask), ("outside", 1 - mask)):
        chosen = difference[:, region[0].bool().numpy()]
        close(found[f"l1_{name}"], np.abs(chosen).mean(axis=(1, 2)))
        close(found[f"psnr_{name}"], -10 * np.log10((chosen**2).mean(axis=(1, 2))))
        first, second = (channels_first(images * region[..., None]) for images in (edited, source))
        _, full = structural_similarity_index_measure(
            first, second, data_range=1.0, return_full_image=True, reduction="none"
        )
        close(found[f"ssim_{name}"], full[..., region[0].bool()].mean(dim=(1, 2)))
    touched = torch.where(mask[..., None] > 0, edited, source)
    kept = metrics.measure(touched, source, mask)
    assert kept["psnr_outside"].tolist() == [100.0, 100.0]
    close(kept["ssim_outside"], [1.0, 1.0])
    assert float(kept["ssim_inside"].max()) < 0.99


def test_equal_pictures_and_empty_regions(metrics: Any) -> None:
    """Protects: equal pictures give a finite PSNR, and a region without pixels gives nan, never a number."""
    source, _ = pictures()
    found = metrics.measure(source, source[:1].expand(2, -1, -1, -1), torch.ones(1, 48, 56))
    assert found["psnr"][0] == found["psnr_inside"][0] == 100.0
    assert found["l1"][0] == 0
    assert all(found[f"{name}_outside"].isnan().all() for name in ("l1", "l2", "psnr", "ssim"))


def test_sizes(metrics: Any) -> None:
    """Protects: what the VAE cropped is cropped from source and mask alike, other sizes are resized to the
    source's, and what does not belong together is refused.
    """
    source, _ = pictures(size=(54, 61))
    cropped = source[:, 3:51, 2:58]
    mask = torch.zeros(1, 54, 61)
    mask[:, 3:51, 2:30] = 1
    changed = cropped.clone()
    changed[:, :, 28:] = 0
    found = metrics.measure(changed, source, mask)
    assert found["psnr_inside"].tolist() == [100.0, 100.0]
    assert float(found["psnr_outside"].max()) < 20
    source, _ = pictures()
    halved = torch.nn.functional.avg_pool2d(channels_first(source), 2).permute(0, 2, 3, 1)
    assert float(metrics.measure(halved, source)["psnr"].min()) > 25
    with pytest.raises(ValueError, match=r"the edited image is 56x48 but .* is 48x56"):
        metrics.measure(source, source.transpose(1, 2))
    with pytest.raises(ValueError, match=r"2 edited images .* with 3"):
        metrics.measure(source, source[[0, 0, 0]])
    with pytest.raises(ValueError, match=r"images of 8x8 are too small"):
        metrics.measure(source[:, :8, :8], source[:, :8, :8])
    with pytest.raises(ValueError, match=r"mask is 56x20 but"):
        metrics.measure(source, source, torch.ones(1, 20, 56))
