"""Trains the shipped Tiny Studio further on scenes of two objects: `python dev.py run
lab.tiny_studio.train_two`.

The VAE is unchanged. Half of the training scenes are of the kinds that it knows already, so that it does not
forget them. Resumes from its last checkpoint; `--pack FILE` writes the current state as a studio.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ...models.files import replacing
from ...models.tiny_studio import networks, scenes, studio
from ...training.state import read_state, write_state
from . import train_diffusion
from .stage import say

WORK = Path(__file__).resolve().parents[2] / ".studio" / "two"
POOL = 20_000
RATE, WARM, DECAY = (
    0.4,
    100,
    800,
)  # fraction of the first training's rates, and the steps of its rise and fall


def pool_scenes() -> list[scenes.Scene]:
    """Every other scene has two objects; none is of a held-out combination."""
    rng = np.random.default_rng(2)
    return [scenes.sample_scene(rng, "two" if index % 2 else None) for index in range(POOL)]


@torch.no_grad()
def encode_pool(path: Path, pool: list[scenes.Scene], start: Path) -> None:
    """The scenes' latents under the packed studio's VAE, as the UNet sees them."""
    if path.exists():
        return
    vae: Any = studio.load_vae(start).first_stage_model
    latents = torch.empty(len(pool), 4, 16, 16, dtype=torch.float16)
    for first in range(0, len(pool), 50):
        image = torch.from_numpy(np.stack([scene.draw() for scene in pool[first : first + 50]]))
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.quant_conv(vae.encoder(image.permute(0, 3, 1, 2) * 2 - 1))[:, :4]
        latents[first : first + 50] = mean.float() * networks.LATENT_SCALE
        if first % 2000 == 0:
            say(f"encode {first}/{len(pool)}")
    write_state(path, {"latents": latents})


def rate(step: int, steps: int) -> float:
    """Fraction of the first training's peak rates: a rise, a plateau, and a fall over the last steps."""
    return RATE * min(1.0, (step + 1) / WARM, max(0.02, (steps - step) / DECAY))


def pack(work: Path, start: Path, path: Path) -> None:
    """The averaged weights with the VAE of `start`, as float16 in one file."""
    average = read_state(work / "diffusion.pt")["average"]
    state = safetensors.torch.load_file(start)
    for name in state:
        if not name.startswith("vae.") and name != "text.tokens":
            state[name] = average["table" if name == "text.table" else name].half().contiguous()
    with replacing(path) as part:
        safetensors.torch.save_file(state, part)
    say(f"wrote {path.name}, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="train_two", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="where latents and checkpoint are kept")
    parser.add_argument("--start", type=Path, default=studio.FILE, help="the packed studio to start from")
    parser.add_argument("--steps", type=int, default=1700, help="48 scenes each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pack", type=Path, help="only write the studio trained so far")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.pack:
        pack(args.work, args.start, args.pack)
        return
    pool = pool_scenes()
    encode_pool(args.work / "latents.pt", pool, args.start)
    train_diffusion.train(args.work, pool, args.steps, args.start, rate)


if __name__ == "__main__":
    main()
