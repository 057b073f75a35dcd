"""Guidance Grid: one edit at every pair of the two scales."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import torch
from host import Host


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


def test_grid(host: Host) -> None:
    """Protects: each cell of the grid is what Dual Guidance and a stock sampler make of its two scales."""
    model, clip, vae, bridge = host.execute("DescEditTinyStudio")
    scene, *_ = host.execute("DescEditTinyScene", seed=8)
    (latent,) = host.execute("VAEEncode", pixels=scene, vae=vae)
    edit, empty = (host.execute("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a blue circle", ""))
    (model,) = host.execute("DescEditApplyBridge", model=model, bridge=bridge, reference=latent)
    sheets = host.pack_module("pictures.contact_sheet")
    rows = []
    for text in (1.0, 4.0):
        cells = []
        for image in (0.0, 2.0):
            (guided,) = host.execute(
                "DescEditDualGuidance", model=model, image_guidance=image, text_guidance=text
            )
            (sampled,) = host.execute(
                "KSampler",
                model=guided,
                positive=edit,
                negative=empty,
                seed=3,
                steps=2,
                cfg=1.0,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
                latent_image={"samples": torch.zeros_like(latent["samples"])},
            )
            cells.append(host.execute("VAEDecode", samples=sampled, vae=vae)[0][0])
        rows.append(cells)
    columns = [(f"image {scale}", [row[index] for row in rows]) for index, scale in enumerate((0, 2))]
    captions = [[f"image {image}, text {text}" for image in (0, 2)] for text in (1, 4)]
    (found,) = host.execute(
        "DescEditGuidanceGrid",
        model=model,
        vae=vae,
        edit=edit,
        unconditional=empty,
        latent=latent,
        image_guidance="0, 2",
        text_guidance="1,4",
        steps=2,
        seed=3,
    )
    expected = sheets.draw_sheet(columns, 160, captions)
    assert found.shape == expected.shape
    assert float((found - expected).abs().mean()) < 1e-3


@pytest.mark.parametrize("text", ["", "1, x", "1, 1", "nan", ", ".join(map(str, range(9)))])
def test_grid_refuses(host: Host, text: str) -> None:
    """Protects: what is no list of up to eight different numbers is named before anything is sampled."""
    given = dict.fromkeys(("model", "vae", "edit", "unconditional", "latent"))
    with pytest.raises(
        ValueError, match=r"Guidance Grid: text_guidance is '.*' but must be 1 to 8 different"
    ):
        host.execute("DescEditGuidanceGrid", **given, text_guidance=text)
