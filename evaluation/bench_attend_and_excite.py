"""A step of diffusers' Attend-and-Excite pipeline (arXiv 2301.13826) on a random UNet of SD1.5's size."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

STEPS = 2


@torch.inference_mode(False)
def attend_and_excite_step(side: int, rounds: int) -> float:
    """Median seconds of a step with one gradient step on 16x16 cross-attention and the guided prediction, on
    latents of `side` x `side`; the first step of each of `rounds` runs, and a first run, do not count.

    Raises ImportError if diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("--attend-and-excite needs diffusers: pip install diffusers") from error
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).requires_grad_(False)
    unet.to_empty(device="cpu")
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))
    pipeline = diffusers.StableDiffusionAttendAndExcitePipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    times: list[float] = []
    for turn in range(rounds + 1):
        marks: list[float] = []
        pipeline(
            prompt=None,
            token_indices=[2],
            prompt_embeds=torch.randn(1, 77, 768),
            negative_prompt_embeds=torch.randn(1, 77, 768),
            height=side * 8,
            width=side * 8,
            num_inference_steps=STEPS,
            max_iter_to_alter=STEPS,
            thresholds={},
            attn_res=(16, 16),
            output_type="latent",
            callback=lambda *_, marks=marks: marks.append(time.perf_counter()),
        )
        times += [after - before for before, after in itertools.pairwise(marks)] if turn else []
    return statistics.median(times)
