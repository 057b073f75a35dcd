"""Draws the scenes and trains the Tiny Studio: `python dev.py studio`.

The stages, each of which resumes after a kill: draw a pool of scenes; train the VAE; encode the pool; train
UNet and text encoder; refine the VAE with its latents kept; train the attribute classifier; pack. `--stage
NAME` runs one of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from ...models.files import replacing
from ...models.tiny_studio import drawing, networks, scenes, studio, words
from ...training.state import read_state, write_state
from . import attribute_classifier, train_diffusion, train_vae
from .stage import say

WORK = Path(__file__).resolve().parents[2] / ".studio"
POOL = 24_000
STAGES = ("draw", "vae", "encode", "diffusion", "refine", "classifier", "pack")


def pool_scenes() -> list[scenes.Scene]:
    """The scenes for all trainings: none has a held-out combination."""
    rng = np.random.default_rng(1)
    return [scenes.sample_scene(rng) for _ in range(POOL)]


def draw_pool(work: Path, pool: list[scenes.Scene]) -> np.ndarray:
    """The pool's images as uint8 [POOL, 128, 128, 3], drawn once and memory-mapped."""
    path = work / "pool.npy"
    if not path.exists():
        pictures = np.empty((POOL, drawing.SIZE, drawing.SIZE, 3), np.uint8)
        for index, scene in enumerate(pool):
            pictures[index] = np.round(scene.draw() * 255)
            if index % 4000 == 0:
                say(f"draw {index}/{POOL}")
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, pictures)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def encode_pool(work: Path, pictures: np.ndarray) -> None:
    """The pool's latents, normalised per channel to zero mean and unit variance, with the mean and spread
    used.
    """
    if (work / "latents.pt").exists():
        return
    vae = networks.new_vae()
    vae.load_state_dict(read_state(work / "vae.pt")["average"])
    latents = torch.empty(len(pictures), 4, 16, 16)
    for start in range(0, len(pictures), 50):
        image = torch.from_numpy(pictures[start : start + 50]).permute(0, 3, 1, 2) / 127.5 - 1.0
        with torch.autocast("cpu", torch.bfloat16):
            latents[start : start + 50] = vae.quant_conv(vae.encoder(image))[:, :4].float()
        if start % 4000 == 0:
            say(f"encode {start}/{len(pictures)}")
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    normal = (latents - mean[:, None, None]) / std[:, None, None]
    write_state(work / "latents.pt", {"latents": normal.half(), "mean": mean, "std": std})


def packed_vae(work: Path) -> dict[str, torch.Tensor]:
    """The VAE's weights with the latents' mean and spread folded into its 1x1 convolutions.

    So the host's SD1.5 latent scale gives unit variance. The log-variance, which nothing here uses, is set
    to a nearly zero variance.
    """
    refined = work / "refine.pt"
    state = dict(read_state(refined if refined.exists() else work / "vae.pt")["average"])
    stored = read_state(work / "latents.pt")
    mean, gain = stored["mean"], 1.0 / (stored["std"] * networks.LATENT_SCALE)
    weight, bias = state["quant_conv.weight"].clone(), state["quant_conv.bias"].clone()
    weight[:4] *= gain[:, None, None, None]
    bias[:4] = (bias[:4] - mean) * gain
    weight[4:], bias[4:] = 0.0, -20.0
    back = state["post_quant_conv.weight"]
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"] + torch.einsum("oikl,i->o", back, mean)
    state["post_quant_conv.weight"] = back / gain[None, :, None, None]
    return {**state, "quant_conv.weight": weight, "quant_conv.bias": bias}


def pack(work: Path, path: Path = studio.FILE) -> None:
    """All networks as float16 in one file, and the attribute classifier in another."""
    average = read_state(work / "diffusion.pt")["average"]
    state = {f"vae.{k}": v for k, v in packed_vae(work).items()}
    state |= {k: v for k, v in average.items() if k.startswith("unet.")}
    state |= {k: v for k, v in average.items() if k.startswith("text.")}
    state["text.table"] = average["table"]
    position = state["text.text_model.embeddings.position_embedding.weight"].clone()
    position[words.LENGTH :] = position[words.LENGTH - 8 : words.LENGTH].mean(0)
    state["text.text_model.embeddings.position_embedding.weight"] = position
    state = {k: v.half().contiguous() for k, v in state.items()}
    state["text.tokens"] = torch.tensor(words.vocabulary())
    read = read_state(work / "attribute_classifier.pt")["model"]
    classifier = {k: v.contiguous() for k, v in read.items()}
    for target, tensors in ((path, state), (attribute_classifier.FILE, classifier)):
        with replacing(target) as part:
            safetensors.torch.save_file(tensors, part)
        say(f"wrote {target.name}, {target.stat().st_size / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dev.py studio", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="where the pool and the checkpoints are kept")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--vae-steps", type=int, default=4200)
    parser.add_argument("--steps", type=int, default=7000, help="of UNet and text encoder, 48 scenes each")
    parser.add_argument("--refine-steps", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pool = pool_scenes()
    pictures = draw_pool(args.work, pool)
    stages = {
        "draw": lambda: None,
        "vae": lambda: train_vae.train(args.work, pictures, args.vae_steps),
        "encode": lambda: encode_pool(args.work, pictures),
        "diffusion": lambda: train_diffusion.train(args.work, pool, args.steps),
        "refine": lambda: train_vae.train(args.work, pictures, args.refine_steps, refine=True),
        "classifier": lambda: attribute_classifier.train(args.work, pictures, pool),
        "pack": lambda: pack(args.work),
    }
    for name, run in stages.items():
        if args.stage in (None, name):
            say(f"stage {name}")
            run()


if __name__ == "__main__":
    main()
