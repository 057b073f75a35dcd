"""UnifyEdit's sampler (arXiv 2504.05594): Euler steps whose latent is moved, before each, by two attention
losses.

Source branch: the inversion's latents, run with the source description. Target branch: the latent that is
sampled, run with the guider's positive conditioning. At each step the target latent takes gradient steps on
structure (SAP) and alignment (CAA), then the guider predicts as usual and the latent goes one Euler step
down, which is a DDIM step without noise of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.samplers
import torch
from comfy.utils import model_trange

from ..host.network_runs import NetworkRuns, refuse_cached_steps
from ..host.out_of_memory import memory_advice
from .optimiser import LatentOptimiser
from .settings import UnifySettings
from .trace import TraceBox, TraceNoise

ADVICE = "switch checkpointing on, lower structure_side, or edit a smaller image or fewer at a time"


class UnifySampler(comfy.samplers.KSAMPLER):
    """SAMPLER that edits an inverted image.

    It starts from the inversion's noise and keeps the inverted image outside a noise mask. Of the latent it
    is given only the size, the number of images and the noise mask count. Raises ValueError before the first
    step if the inversion does not belong to the guider's model, the latent's size or the sigmas, or if the
    settings do not fit them; and after the last if an image had no usable gradient in any step.

    noise: a NOISE, empty, with which a run leaves its trace in the LATENT it makes.
    """

    def __init__(self, settings: UnifySettings, door: AbstractContextManager[Any] | None = None) -> None:
        super().__init__(_sample_unify)
        self._settings, self._door = settings, door or nullcontext()
        self._box: TraceBox | None = None
        self.noise = TraceNoise(self._expect)

    def _expect(self, box: TraceBox) -> None:
        self._box = box

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        box, self._box = self._box, None
        inversion = self._settings.inversion
        with self._door:
            refuse_cached_steps(model_wrap.model_patcher)
            inversion.check(model_wrap.model_patcher, noise.shape, sigmas)
        clean = inversion.latent(-1, noise)
        # On the straight line from the inverted noise to the image, which is where Euler steps keep what a
        # noise mask protects.
        noise = (inversion.latent(0, noise) - clean) / sigmas[0]
        run = comfy.samplers.KSAMPLER(_sample_unify, {"settings": self._settings, "box": box})
        with self._door, memory_advice(ADVICE):
            return run.sample(
                model_wrap, sigmas, extra_args, callback, noise, clean, denoise_mask, disable_pbar
            )


def _sample_unify(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    settings: UnifySettings,
    box: TraceBox | None,
) -> torch.Tensor:
    extra_args = extra_args or {}
    x = settings.inversion.latent(0, x)
    rows = x.new_ones([x.shape[0]])
    runs = NetworkRuns()
    watched = {**extra_args, "model_options": runs.attach(extra_args["model_options"])}
    optimiser = LatentOptimiser(model.inner_model, settings, x, sigmas, extra_args)
    try:
        optimiser.lay_masks(x, extra_args.get("denoise_mask"))
        for i in model_trange(len(sigmas) - 1, disable=disable):
            sigma, below = sigmas[i], sigmas[i + 1]
            offset = optimiser.read_source(i, x, sigma * rows)
            for iteration in range(settings.inner_iterations):
                move = optimiser.update(i, x, sigma * rows, iteration)
                if settings.method == "latent":
                    x = x - move
            denoised = model(x, sigma * rows, **watched) + offset
            runs.check()
            if settings.method == "noise":
                # Added to the predicted noise, at the length that moves the next latent by `move`.
                denoised = denoised - move * (sigma / (sigma - below))
            if callback is not None:
                callback({"i": i, "denoised": denoised, "x": x, "sigma": sigma, "sigma_hat": sigma})
            x = x + (x - denoised) / sigma * (below - sigma)
    finally:
        optimiser.close()
    trace = optimiser.finish()
    if box is not None:
        box.trace = trace
    return x
