"""Trains the Tiny Studio's VAE on crops of drawn scenes, and refines it after the UNet's training.

Muon on the convolutions and a fixed noise on the latents instead of a learned one: on two cores they need 200
steps for what AdamW with a KL term needs 600 for (measured).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...models.tiny_studio import drawing, networks
from ...training.state import read_state
from .stage import Stage, learning_rate, muon_and_adamw

CROP, BATCH = 64, 8
LATENT_NOISE = 0.1
ANCHOR = 0.3  # of the distance of refined latents from those that the UNet knows
COLOUR_WEIGHT = (
    4.0  # of each cell's mean colour: group normalisation drops it, and edges hide that in the plain loss
)
MUON_RATE, ADAM_RATE = 6e-3, 2e-3


def crops(pictures: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Random crops [BATCH, 3, CROP, CROP] in -1..1, placed on the latent grid."""
    batch = np.empty((BATCH, CROP, CROP, 3), np.float32)
    for row in range(BATCH):
        y, x = rng.integers(0, (drawing.SIZE - CROP) // 8 + 1, 2) * 8
        batch[row] = pictures[rng.integers(len(pictures)), y : y + CROP, x : x + CROP]
    return torch.from_numpy(batch).permute(0, 3, 1, 2) / 127.5 - 1.0


def _latent(vae: Any, image: torch.Tensor) -> torch.Tensor:
    return vae.quant_conv(vae.encoder(image)).chunk(2, dim=1)[0].float()


def train(work: Path, pictures: np.ndarray, steps: int, refine: bool = False) -> None:
    """Train both halves, or refine a finished pair, whose latents then stay close to the old ones."""
    torch.manual_seed(0)
    vae = networks.new_vae()
    known = None
    if refine:
        finished = read_state(work / "vae.pt")["average"]
        vae.load_state_dict(finished)
        known = networks.new_vae().requires_grad_(False)
        known.load_state_dict(finished)
    path = work / ("refine.pt" if refine else "vae.pt")
    stage = Stage(path, vae, muon_and_adamw(vae, MUON_RATE, ADAM_RATE), 0.998)
    rng = np.random.default_rng(1000 + stage.step)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        image = crops(pictures, rng)
        with torch.autocast("cpu", torch.bfloat16):
            mean = _latent(vae, image)
            out = vae.decoder(vae.post_quant_conv(mean + LATENT_NOISE * torch.randn_like(mean))).float()
        mse = F.mse_loss(out, image)
        colour = F.mse_loss(F.avg_pool2d(out, 8), F.avg_pool2d(image, 8))
        loss = F.l1_loss(out, image) + 4.0 * mse + COLOUR_WEIGHT * colour
        if known is None:
            return loss + 1e-4 * mean.square().mean(), mse
        with torch.autocast("cpu", torch.bfloat16):
            return loss + ANCHOR * F.mse_loss(mean, _latent(known, image)), mse

    stage.run(steps, losses, lambda step, all: learning_rate(step, all) * (0.4 if refine else 1.0))
