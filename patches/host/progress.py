"""How far a sampling has come, read off the noise level."""

from __future__ import annotations

from typing import Any

import torch


def progress(model_sampling: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """1 - t/T at every noise level of `sigmas`: 0 at pure noise, 1 at the clean image."""
    first, last = (
        model_sampling.timestep(sigma).float().to(sigmas.device)
        for sigma in (model_sampling.sigma_min, model_sampling.sigma_max)
    )
    return ((last - model_sampling.timestep(sigmas).float()) / (last - first)).clamp(0, 1)
