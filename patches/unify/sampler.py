"""UnifyEdit's sampler (arXiv 2504.05594): before each Euler step two attention losses move the latent.

Source branch: the inversion's latents, run with the source description. Target branch: the sampled latent,
run with the guider's positive conditioning. At each step the target latent takes gradient steps on structure
(SAP) and alignment (CAA). Then the guider predicts as usual and the latent takes one Euler step, which is a
DDIM step without added noise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.samplers
import torch
from comfy.utils import model_trange

from ..attention.checks import check_entries
from ..attention.masks import check_mask
from ..attention.networks import readable_of
from ..attention.recorder import whole_image
from ..host.inputs import check_noise_mask
from ..host.network_runs import NetworkRuns, refuse_cached_steps
from ..host.options import one_device
from ..host.out_of_memory import memory_advice
from ..host.sigmas import noise_between
from .balance import Slope, row_norm
from .mask import find_mask
from .memory import plan_memory
from .plan import choose_layers, plan_steps
from .settings import UnifySettings
from .source import open_source
from .target import make_target
from .text_guidance import TextGuidance
from .trace import Record, Trace, make_trace

ADVICE = (
    "switch checkpointing on or lower max_self_attn_res in UnifyEdit Options, or edit a smaller image or "
    "fewer at a time"
)


class UnifySampler(comfy.samplers.KSAMPLER):
    """SAMPLER that edits an inverted image.

    It starts from the inversion's noise and keeps the inverted image outside a noise mask. Of the given
    latent only the size, the number of images and the noise mask are used.

    door: context that is entered around the pack's own code in a run.
    report: called with the run's Trace.

    Raises ValueError before the first step if the inversion does not belong to the guider's model, the
    latent's size or the sigmas, or if the settings do not fit them. Raises ValueError after the last step if
    an image had no usable gradient in any step.
    """

    def __init__(
        self,
        settings: UnifySettings,
        door: AbstractContextManager[Any] | None = None,
        report: Callable[[Trace], None] | None = None,
    ) -> None:
        super().__init__(sample_unify, {"settings": settings, "report": report})
        self._settings, self._door = settings, door or nullcontext()

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        inversion = self._settings.inversion
        with self._door, memory_advice(ADVICE):
            refuse_cached_steps(model_wrap.model_patcher)
            inversion.check(model_wrap.model_patcher, noise.shape, sigmas)
            # On the straight line from the inverted noise to the image, which is where Euler steps keep what
            # a noise mask protects.
            clean = inversion.latent(-1, noise)
            sampling = model_wrap.inner_model.model_sampling
            noise = noise_between(sampling, sigmas[0], clean, inversion.latent(0, noise))
            return super().sample(
                model_wrap, sigmas, extra_args, callback, noise, clean, denoise_mask, disable_pbar
            )


def sample_unify(
    model: comfy.samplers.KSamplerX0Inpaint,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    settings: UnifySettings,
    report: Callable[[Trace], None] | None = None,
) -> torch.Tensor:
    """The algorithm, as a sampler function of the host.

    x: [rows, channels, height, width]; only its shape counts. sigmas: [steps + 1]. settings and report: as in
    UnifySampler. Returns the edited latent in the model's own space.
    """
    extra_args = extra_args or {}
    guider, options, inversion = model.inner_model, settings.options, settings.inversion
    model_options, denoise_mask = one_device(extra_args["model_options"]), extra_args.get("denoise_mask")
    reach = 1.0 if denoise_mask is None else denoise_mask
    runs = NetworkRuns()
    text = TextGuidance()
    watched = {**extra_args, "model_options": text.attach(runs.attach(extra_args["model_options"]))}
    x = inversion.latent(0, x)
    rows = x.new_ones([len(x)])

    plan = plan_steps(settings, guider.inner_model.model_sampling, sigmas)
    network = readable_of(guider.inner_model.diffusion_model)
    kind = type(guider.inner_model.model_config).__name__
    layers = choose_layers(settings, plan, network, kind, x)
    tokens = settings.tokens(len(x))
    for entries in guider.conds.values():
        check_entries(network, entries)
    _check_run(guider, settings, denoise_mask, x)
    memory = plan_memory(guider, x, layers, options.checkpointing, inversion.virtual)
    records: list[Record] = []
    with open_source(guider, network, inversion, x, model_options, extra_args, memory.size) as (
        source,
        patchers,
    ):
        mask = settings.mask
        if mask is None and options.auto_mask:
            mask = find_mask(source, guider.conds["positive"], tokens, layers.words, plan, x)
            settings.check_cover(mask, "the automatic mask")
        target = make_target(
            guider, source, options, tokens, mask, layers, x, model_options, patchers, memory
        )
        for i in model_trange(len(sigmas) - 1, disable=disable):
            sigma, below, step = sigmas[i], sigmas[i + 1], plan[i]
            reading = source.open(i, x, layers.structure if step.structure else ())
            if inversion.virtual:
                source.read(reading, sigma * rows)
            move: torch.Tensor | float = 0.0
            for inner in range(options.inner_steps):
                found = target.gradients(x, step.sigma, reading, step.alignment > 0)
                if found is None:
                    break
                # Image by image: the source branch's own step, and what guidance by the text moves in one.
                length = row_norm(source.latent(i, x) - source.latent(i + 1, x))
                whole = settings.balance.move(
                    Slope(found.structure, found.excess("structure"), length),
                    Slope(found.alignment, found.excess("alignment"), text.length(sigma, below, length)),
                    step.weights,
                )
                move = whole * reach
                if options.update_target == "latent":
                    x = x - move
                usable = (whole != 0).flatten(1).any(dim=1)
                at = i + inner / options.inner_steps
                records.append(Record(at, found.values, usable, found.reordered, found.mixed))
            denoised = model(x, sigma * rows, **watched) + reading.offset
            runs.check()
            if options.update_target == "noise":
                # Added to the predicted noise, at the length that moves the next latent by `move`.
                denoised = denoised - move * (sigma / (sigma - below))
            if callback is not None:
                callback({"i": i, "denoised": denoised, "x": x, "sigma": sigma, "sigma_hat": sigma})
            x = x + (x - denoised) / sigma * (below - sigma)
    trace = make_trace(plan, records, len(x), mask)
    if report is not None:
        report(trace)
    return x


def _check_run(
    guider: comfy.samplers.CFGGuider,
    settings: UnifySettings,
    denoise_mask: torch.Tensor | None,
    x: torch.Tensor,
) -> None:
    """Raise ValueError for what the settings could not know: the guider's text, the masks' rows."""
    if not whole_image(guider.conds.get("positive") or []):
        raise ValueError(
            "the guider's positive conditioning has no entry for the whole image: "
            "wire the edit description without an area or a mask to it"
        )
    if denoise_mask is not None:
        check_noise_mask(denoise_mask)
    if settings.mask is not None:
        scale = settings.inversion.scale
        check_mask(settings.mask, len(x), x.shape[-2] * scale, x.shape[-1] * scale)
