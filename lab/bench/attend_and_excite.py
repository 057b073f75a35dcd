"""A step of diffusers' Attend-and-Excite pipeline (arXiv 2301.13826) on a random UNet of SD1.5's size.

It runs in its own process, so that its memory can be measured.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .measuring import device, dtype, now, peak_memory

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2


def attend_and_excite(side: int, rounds: int) -> dict[str, float]:
    """Time and memory of steps with one gradient step on 16x16 cross-attention and the guided prediction.

    Latents are `side` x `side`. The first step of each of `rounds` runs, and a first run, are not counted.
    `seconds`: the median. `peak`: the peak memory in bytes (measuring.py).
    Raises ImportError if diffusers is not installed.
    """
    if find_spec("diffusers") is None:
        raise ImportError("--attend-and-excite needs diffusers: pip install diffusers==0.42.1")
    command = [sys.executable, ROOT / "dev.py", "_run", "lab.bench.attend_and_excite"]
    done = subprocess.run([*command, str(side), str(rounds)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def pipeline() -> Any:
    """The pipeline without VAE and text encoder."""
    diffusers = import_module("diffusers")
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
    unet.to(dtype()).to_empty(device=device())
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))
    made = diffusers.StableDiffusionAttendAndExcitePipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def main() -> None:
    side, rounds = map(int, sys.argv[1:])
    run = partial(
        pipeline(),
        prompt=None,
        token_indices=[2],
        prompt_embeds=torch.randn(1, 77, 768, dtype=dtype()),
        negative_prompt_embeds=torch.randn(1, 77, 768, dtype=dtype()),
        height=side * 8,
        width=side * 8,
        num_inference_steps=STEPS,
        max_iter_to_alter=STEPS,
        thresholds={},
        attn_res=(16, 16),
        output_type="latent",
    )
    marks: list[float] = []
    times: list[float] = []
    peak = peak_memory(lambda: run(callback=lambda *_: marks.append(now())))
    for _ in range(rounds):
        marks.clear()
        run(callback=lambda *_: marks.append(now()))
        times += [after - before for before, after in itertools.pairwise(marks)]
    print(json.dumps({"seconds": statistics.median(times), "peak": peak}))


if __name__ == "__main__":
    main()
