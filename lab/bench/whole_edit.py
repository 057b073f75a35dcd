"""Cost of a whole edit with UnifyEdit, inversion and all, against a stock run of as many steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ...patches.host.sigmas import schedule
from ...patches.inversion import invert
from ...patches.unify.balance import Balance
from ...patches.unify.edit import edit_latent
from ...patches.unify.settings import UnifyOptions
from ...patches.unify.tokens import EditTokens, EditWord
from .bridge import conditioning, plain_cfg, sample
from .measuring import alternating, median_ratio, now

TOKENS = EditTokens((EditWord("word", (2,), (2,)),), edit_length=4, source_length=4, alignment=())
SCHEDULER, DENOISE = "normal", 0.6  # a random UNet is too steep at full noise


def latent(side: int) -> torch.Tensor:
    """Random, as large as a VAE of SD1.5 gives."""
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(6)) / 0.18215


def edit(model: Any, side: int, steps: int, options: UnifyOptions) -> None:
    edit_latent(
        model,
        latent(side),
        None,
        source=conditioning(3),
        edit=conditioning(4),
        negative=conditioning(5),
        edit_tokens=TOKENS,
        mask=None,
        steps=steps,
        cfg=7.5,
        scheduler=SCHEDULER,
        denoise=DENOISE,
        structure=Balance.beta1,
        words=Balance.beta2,
        options=options,
    )


def reconstruction_db(model: Any, side: int, steps: int, refine: int) -> float:
    """How far the stock Euler sampler comes back to an inverted latent: its mean square over the error's."""
    before, text = latent(side), conditioning(3)
    sigmas = schedule(model, SCHEDULER, steps, DENOISE)
    start = invert(model, before, text, sigmas, refine).trajectory[0]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text, text)
    guider.set_cfg(1.0)
    after = guider.sample(
        torch.zeros_like(start),
        model.model.process_latent_out(start.clone()),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        disable_pbar=True,
        seed=0,
    ).to(before)
    return float(10 * torch.log10(before.square().mean() / (after - before).square().mean()))


def measure(
    model: Any, side: int, steps: int, rounds: int, options: UnifyOptions, prefix: str = ""
) -> dict[str, float]:
    """`edit_ratio` and `edit_reconstruction_db`, each with `prefix` before it."""
    runs: dict[str, Callable[[], None]] = {
        "stock": partial(sample, plain_cfg(model), side, comfy.samplers.sampler_object("euler"), steps),
        "edit": partial(edit, model, side, steps, options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, counted in alternating(runs, rounds):
        begin = now()
        runs[name]()
        seconds[name] += [now() - begin] if counted else []
    for name, times in seconds.items():
        print(f"{side}x{side}, {name}, {steps} steps: {statistics.median(times):.2f} s", flush=True)
    return {
        f"{prefix}edit_ratio": median_ratio(seconds["edit"], seconds["stock"]),
        f"{prefix}edit_reconstruction_db": reconstruction_db(model, side, steps, options.refine),
    }
