"""Trains the Tiny Flux on the Tiny Studio's latents and text: `python dev.py studio --flux`.

Rectified flow: x_t = (1 - t) x_0 + t n, the network predicts n - x_0, and t is the sigmoid of a normal value
(Esser et al., arXiv 2403.03206). VAE and text encoder are the shipped ones and do not learn. Resumes from its
last checkpoint; `--pack FILE` writes the averaged weights so far, `--report FILE` measures packed ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch

from ...models.files import replacing
from ...models.tiny_studio import flux, scenes, studio, words
from ...patches.host.autograd import gradients
from ...training.state import read_state
from . import report, train_diffusion, train_two
from .stage import Stage, muon_and_adamw, say

WORK = Path(__file__).resolve().parents[2] / ".studio" / "flux"
BATCH = 64
CAPTION_DROP = 0.1
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


def _attention(_: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)


def predict(network: Any, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The velocity, in bfloat16 where that is cheaper.

    x: [rows, 4, 16, 16].
    t: [rows].
    text: [rows, TOKENS, width].
    """
    options = {"optimized_attention_override": _attention}
    with torch.autocast(x.device.type, torch.bfloat16):
        return network(x, t, text, transformer_options=options).float()


def train(work: Path, pool: list[scenes.Scene], steps: int, start: Path) -> None:
    """Train until `steps`, from the last checkpoint.

    pool: the scenes whose latents are in `work`.
    start: the packed studio with the text encoder.
    """
    torch.manual_seed(4)
    device = comfy.model_management.get_torch_device()
    latents = torch.load(work / "latents.pt", weights_only=True, map_location=device)["latents"]
    reader = train_diffusion.TextAndUNet(words.vocabulary())
    reader.load_state_dict(train_diffusion.packed(start))
    reader.to(device)
    network = flux.new_network().to(device)
    stage = Stage(work / "flux.pt", network, muon_and_adamw(network, MUON_RATE, ADAM_RATE), 0.9985)
    rng = np.random.default_rng(4000 + stage.step)
    torch.manual_seed(4000 + stage.step)

    def losses() -> tuple[torch.Tensor]:
        picked = rng.integers(len(latents), size=BATCH)
        texts = [
            "" if rng.random() < CAPTION_DROP else scenes.caption(pool[i], scenes.random_named(pool[i], rng))
            for i in picked
        ]
        with torch.no_grad():
            rows = words.padded(texts, reader.rows).to(device)
            text = reader.context(rows)[:, : flux.TOKENS]
        clean = latents[picked].float()
        noise, t = torch.randn_like(clean), torch.randn(BATCH, device=device).sigmoid()
        along = t[:, None, None, None]
        with gradients():
            found = predict(network, (1 - along) * clean + along * noise, t, text)
        return (F.mse_loss(found, noise - clean),)

    stage.run(steps, losses)


def pack(work: Path, path: Path) -> None:
    """The averaged weights as float16."""
    average = read_state(work / "flux.pt")["average"]
    with replacing(path) as part:
        safetensors.torch.save_file({name: w.half().contiguous() for name, w in average.items()}, part)
    say(f"wrote {path.name}, {path.stat().st_size / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dev.py studio --flux", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="where latents and checkpoint are kept")
    parser.add_argument("--start", type=Path, default=studio.FILE, help="the packed studio")
    parser.add_argument("--steps", type=int, default=12_000, help="64 scenes each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pack", type=Path, help="only write the weights trained so far")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=flux.FILE,
        metavar="FILE",
        help="only measure packed weights on held-out scenes; those of the repository without FILE",
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.report:
        tiny = flux.load_model(args.report), studio.load_clip(args.start), studio.load_vae(args.start)
        with torch.inference_mode():
            print(
                f"prompts with all attributes right: {report.prompts(tiny).accuracy:.1%} of {report.PROMPTS}"
            )
            psnr = report.inversion_psnr(*tiny, report.held_scenes(10, 11))
        print(f"images inverted and sampled again: {psnr:.1f} dB")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if args.pack:
        pack(args.work, args.pack)
        return
    pool = train_two.pool_scenes()
    train_two.encode_pool(args.work / "latents.pt", pool, args.start)
    train(args.work, pool, args.steps, args.start)


if __name__ == "__main__":
    main()
