"""Edits a latent: inversion and sampling, through the host's own guider."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from ..attention.networks import readable_of
from ..host.sigmas import schedule
from ..inversion import invert, invert_virtually
from .balance import Balance
from .mask import image_mask
from .sampler import UnifySampler
from .settings import UnifyOptions, UnifySettings
from .tokens import EditTokens
from .trace import Trace


def edit_latent(
    model: ModelPatcher,
    samples: torch.Tensor,
    noise_mask: torch.Tensor | None,
    *,
    source: list[Any],
    edit: list[Any],
    negative: list[Any] | None,
    edit_tokens: EditTokens,
    mask: torch.Tensor | None,
    steps: int,
    cfg: float,
    scheduler: str,
    denoise: float,
    structure: float,
    words: float,
    options: UnifyOptions,
    report: Callable[[str], None] = lambda phase: None,
) -> tuple[torch.Tensor, torch.Tensor, Trace]:
    """The edited latent; the edit region, [rows or 1, height, width] in pixels; the run's Trace.

    samples: [images, channels, height, width] as a VAE gives it.
    noise_mask: of the LATENT, or None.
    source, edit, negative: CONDITIONING; without a negative one zeros.
    mask: as in UnifySettings.
    structure, words: the balance's beta1 and beta2.
    report: gets the name of each phase when it begins.

    Raises ValueError for anything that the inversion or the sampler refuses, and if the balance in `options`
    conflicts with structure or words.
    """
    settings = {
        "edit_tokens": edit_tokens,
        "balance": _balance(structure, words, options.balance),
        "mask": mask,
        "options": options,
    }
    readable_of(model.model.diffusion_model)
    sigmas = schedule(model, scheduler, steps, denoise)
    report("inverting")
    if options.inversion == "virtual":
        inversion = invert_virtually(model, samples, source, sigmas, options.virtual_seed)
    else:
        inversion = invert(model, samples, source, sigmas, options.refine)
    traces: list[Trace] = []
    sampler = UnifySampler(UnifySettings(inversion=inversion, **settings), report=traces.append)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(edit, _zeros(edit) if negative is None else negative)
    guider.set_cfg(cfg)
    report("editing")
    edited = guider.sample(
        torch.zeros_like(samples),
        samples,
        sampler,
        sigmas,
        denoise_mask=noise_mask,
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    height, width = (size * inversion.scale for size in samples.shape[-2:])
    region = image_mask(traces[0].mask, height, width)
    return edited.to(comfy.model_management.intermediate_device()), region, traces[0]


def _zeros(conditioning: list[Any]) -> list[Any]:
    """Zeros instead of a text, as in the host's ConditioningZeroOut."""
    found = []
    for text, values in conditioning:
        pooled = values.get("pooled_output")
        found.append(
            [
                torch.zeros_like(text),
                {**values, "pooled_output": None if pooled is None else torch.zeros_like(pooled)},
            ]
        )
    return found


def _balance(structure: float, words: float, wired: Balance | None) -> Balance:
    """The balance from both strengths and the options."""
    for name, given in (("structure", structure), ("words", words)):
        if not math.isfinite(given) or given < 0:
            raise ValueError(f"{name} is {given} but must be 0 or a positive number")
    if wired is None:
        return Balance(beta1=structure, beta2=words)
    default = Balance()
    for name, given, beta, usual in (
        ("structure", structure, "beta1", default.beta1),
        ("words", words, "beta2", default.beta2),
    ):
        if given not in (usual, getattr(wired, beta)):
            raise ValueError(
                f"{name} is {given} but the balance in options has a {beta} of {getattr(wired, beta)}: set "
                f"{beta} there and leave {name} at {usual}, or take the balance out of options"
            )
    return wired
