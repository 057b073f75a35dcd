"""The sigmas of a sampling."""

from __future__ import annotations

import copy
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher


def progress(model_sampling: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """1 - t/T at each of `sigmas`: 0 at pure noise, 1 at the clean image."""
    first, last = (
        model_sampling.timestep(sigma).float().to(sigmas.device)
        for sigma in (model_sampling.sigma_min, model_sampling.sigma_max)
    )
    return ((last - model_sampling.timestep(sigmas).float()) / (last - first)).clamp(0, 1)


def noise_between(sampling: Any, sigma: Any, clean: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """The noise with which the host's scaling for `sigma` takes the clean latent to the noisy one.

    sampling: the host's `model_sampling`, of any prediction: clean + sigma n, and on a flow model
        (1 - sigma) clean + sigma n.
    """
    zeros = torch.zeros_like(clean)
    start = sampling.noise_scaling(sigma, zeros, clean)
    return (noisy - start) / sampling.noise_scaling(sigma, torch.ones_like(clean), zeros)


def schedule(model: ModelPatcher, scheduler: str, steps: int, denoise: float) -> torch.Tensor:
    """The sigmas of the last `steps` steps of a schedule, [steps + 1], as in the host's BasicScheduler and
    KSampler.

    They come from a copy of the model's tables on the CPU. The tables move to the card with the model's first
    load, and there the last bit can differ: enough to move a sigma that lies half way between two timesteps
    to the other one, so that a first run would differ from the next.

    denoise: 0 to 1. Raises ValueError for 0, and if the schedule cannot be cut into so many steps.
    """
    if denoise <= 0:
        raise ValueError("denoise is 0: nothing to sample; use a number above 0, up to 1")
    total = steps if denoise >= 1 else int(steps / denoise)
    sampling = copy.deepcopy(model.get_model_object("model_sampling")).cpu()
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, total)[-(steps + 1) :]
    if not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise ValueError(
            f"the scheduler {scheduler} cannot make steps {steps} at denoise {denoise:g}: its sigmas do not "
            "fall at every step. Use another number of steps, or the scheduler normal"
        )
    return sigmas
