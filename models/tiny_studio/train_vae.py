"""Learn the Tiny Studio's VAE on crops of drawn scenes, then its decoder alone with the encoder frozen.

Muon on the convolutions and a fixed noise on the latents instead of a learned one: on two cores they
reach in 200 steps what AdamW with a KL term needs 600 for (measured).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import drawing, networks
from .training_tools import Average, Optimiser, learning_rate, resume, save, say

CROP, BATCH = 64, 8
LATENT_NOISE = 0.1
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


def train(work: Path, pictures: np.ndarray, steps: int, decoder_only: bool = False) -> None:
    """Learn both halves, or go on with the decoder of a finished pair."""
    torch.manual_seed(0)
    vae = networks.new_vae()
    path = work / ("decoder.pt" if decoder_only else "vae.pt")
    learned = [vae.decoder, vae.post_quant_conv] if decoder_only else [vae]
    optimiser = Optimiser(learned, MUON_RATE, ADAM_RATE)
    average = Average(vae, 0.998)
    step = 0
    if state := resume(path):
        step = state["step"]
        vae.load_state_dict(state["model"])
        average.values = state["average"]
        optimiser.load_state_dict(state["optimisers"])
    elif decoder_only:
        average.values = resume(work / "vae.pt")["average"]
        vae.load_state_dict(average.values)
    rng = np.random.default_rng(1000 + step)
    begin = saved = time.time()
    first = step
    errors: list[float] = []

    def checkpoint() -> None:
        states = {"model": vae.state_dict(), "average": average.values, "optimisers": optimiser.state_dict()}
        save(path, {**states, "step": step})

    while step < steps:
        image = crops(pictures, rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                mean = vae.quant_conv(vae.encoder(image)).chunk(2, dim=1)[0].float()
            out = vae.decoder(vae.post_quant_conv(mean + LATENT_NOISE * torch.randn_like(mean))).float()
        mse = F.mse_loss(out, image)
        colour = F.mse_loss(F.avg_pool2d(out, 8), F.avg_pool2d(image, 8))
        loss = F.l1_loss(out, image) + 4.0 * mse + COLOUR_WEIGHT * colour + 1e-4 * mean.square().mean()
        vae.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step(learning_rate(step, steps) * (0.4 if decoder_only else 1.0))
        step += 1
        average.update(vae, step)
        errors.append(mse.item())
        if step % 100 == 0:
            psnr = 10 * math.log10(4 / np.mean(errors[-100:]))
            left = (steps - step) * (time.time() - begin) / (step - first) / 60
            say(
                f"{path.stem} {step}/{steps} psnr {psnr:.2f} dB, latent std {mean.std().item():.2f}, "
                f"{left:.0f} min left"
            )
        if time.time() - saved > 120:
            checkpoint()
            saved = time.time()
    checkpoint()
