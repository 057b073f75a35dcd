"""Inversion: the noise, and the whole path, from which the host's Euler sampler reproduces a given image."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST
from comfy.utils import model_trange

from .attention.checks import check_entries
from .attention.networks import readable_of
from .host.identity import ModelIdentity
from .host.inputs import read_samples
from .host.network_runs import NetworkRuns, refuse_cached_steps
from .host.out_of_memory import memory_advice
from .host.sigmas import noise_between

MODES = ("ddim", "virtual")
REFINE = 1  # the default


@dataclass(frozen=True, eq=False)
class Inversion:
    """INVERSION: an image's path from clean to noise.

    trajectory: [steps + 1, images, channels, height, width] float32 in host RAM, in the model's own space
    (after `process_latent_in`); entry i belongs to `sigmas[i]`, the last one is the clean latent.
    sigmas: [steps + 1], falling to 0.
    conditioning: the source description's CONDITIONING.
    model: identity of its model.
    virtual: whether the path is the straight line of `invert_virtually`.
    scale: image pixels per position of the latent, along each side.
    """

    trajectory: torch.Tensor
    sigmas: torch.Tensor
    conditioning: list[Any]
    model: ModelIdentity
    virtual: bool = False
    scale: int = 8

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def check(self, model: ModelPatcher, shape: torch.Size, sigmas: torch.Tensor) -> None:
        """Raise ValueError unless a sampling with this model, latent shape and sigmas can follow the path."""
        difference = self.model.difference(ModelIdentity.of(model))
        if difference is not None:
            raise ValueError(
                f"the inversion was made with another model: the guider has {difference}. "
                "Wire the same MODEL to the inversion and to the guider"
            )
        images, *size = self.trajectory.shape[1:]
        if size != list(shape[1:]):
            raise ValueError(
                f"the inversion is of a latent of {_size(size)} but latent_image is "
                f"{_size(shape[1:])}: wire the inversion's noise, or the latent that was inverted, to "
                "latent_image"
            )
        if images not in (1, shape[0]):
            raise ValueError(
                f"the inversion holds {images} images but latent_image has {shape[0]}: "
                "invert one image, or as many as are edited"
            )
        if len(sigmas) != len(self.sigmas):
            raise ValueError(
                f"the inversion has {self.steps} steps but the sampler was given {len(sigmas) - 1}: "
                "wire the same SIGMAS to the inversion and to the sampler"
            )
        if not torch.allclose(sigmas.cpu().float(), self.sigmas, rtol=1e-4, atol=1e-6):
            raise ValueError(
                "the inversion was made with other sigmas (scheduler or denoise): "
                "wire the same SIGMAS to the inversion and to the sampler"
            )

    def latent(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """The path's latent at `sigmas[index]`, one row for each row of `like`, on its device."""
        return self.trajectory[index].to(like.device, non_blocking=True).expand_as(like)


def invert(
    model: ModelPatcher, samples: torch.Tensor, conditioning: list[Any], sigmas: torch.Tensor, refine: int
) -> Inversion:
    """Follow the probability-flow ODE from a clean latent up through `sigmas`, with the description alone.

    A sampler's Euler step from x_i down to x_{i+1} uses the noise predicted at x_i, which the inversion does
    not know yet. Plain DDIM inversion predicts at the known end instead and drifts. Here x_i solves the
    implicit equation x_i = x_{i+1} + (sigma_i - sigma_{i+1}) eps(x_i, sigma_i) by fixed-point iteration. It
    begins at a slope that continues the last two steps' slopes; later calls of a step are mixed by Anderson's
    method (Anderson, J. ACM 12, 1965) of depth 1. Steps that need more calls get more (`share_calls`).

    Changes of the network act as in a stock run: LoRAs, attention patches, a `model_function_wrapper`, a
    ControlNet of the description, and wrappers of the kinds OUTER_SAMPLE, PREPARE_SAMPLING, SAMPLER_SAMPLE,
    CALC_COND_BATCH, APPLY_MODEL and DIFFUSION_MODEL. Guidance does not act: CFG functions, pre- and post-CFG
    functions, a `sampler_calc_cond_batch_function`, and PREDICT_NOISE wrappers.

    samples: [images, channels, height, width] as a VAE gives it.
    sigmas: [steps + 1], falling to 0.
    refine: model calls beyond one a step, on average; 0 or more.

    Raises ValueError for an empty latent, a latent of another model family, sigmas that do not fall to 0, a
    description that the host itself cannot run, a node that keeps the network from running at a step, and a
    path that is not finite.
    """
    refuse_cached_steps(model)
    samples, sigmas = _checked(model, samples, sigmas)
    path: list[torch.Tensor] = []
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    with memory_advice("invert a smaller image, or fewer at a time"):
        guider.sample(
            torch.zeros_like(samples),
            samples,
            comfy.samplers.KSAMPLER(_sample_upwards, {"calls": share_calls(sigmas, refine), "path": path}),
            sigmas,
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=0,
        )
    trajectory = torch.stack(path[::-1]).cpu()
    _check_finite(trajectory)
    return Inversion(trajectory, sigmas, conditioning, ModelIdentity.of(model), scale=_scale(model))


def invert_virtually(
    model: ModelPatcher, samples: torch.Tensor, conditioning: list[Any], sigmas: torch.Tensor, seed: int
) -> Inversion:
    """The straight path from a clean latent to noise n, without a model call: x_i = x_0 + sigma_i n, and on a
    flow model (1 - sigma_i) x_0 + sigma_i n.

    The idea of InfEdit's virtual inversion (arXiv 2312.04965). The path is not a solution of the model's ODE.
    But the sampler knows x_0 at every step and subtracts the error of the source's prediction from the
    target's, so the same description reproduces the image exactly (`unify.source.Source.read`). InfEdit draws
    new noise at every step; here n is one for the run, and the same for all images, so that a batch equals
    single runs.

    seed: of n, 0 or more.
    Other arguments and errors as in `invert`. Also raises ValueError for a conditioning with areas or masks.
    """
    samples, sigmas = _checked(model, samples, sigmas)
    if any("area" in values or "mask" in values for _, values in conditioning):
        raise ValueError(
            "source has entries with an area or a mask, which a virtual inversion cannot follow: "
            "wire one description of the whole image, or use the mode ddim"
        )
    noise = torch.randn([1, *samples.shape[1:]], generator=torch.Generator().manual_seed(seed))
    clean = model.model.process_latent_in(samples.detach().cpu())
    sampling: Any = model.get_model_object("model_sampling")
    noise = noise.expand_as(clean)
    trajectory = torch.stack([sampling.noise_scaling(sigma, noise, clean) for sigma in sigmas])
    return Inversion(
        trajectory, sigmas, conditioning, ModelIdentity.of(model), virtual=True, scale=_scale(model)
    )


@dataclass(frozen=True, eq=False)
class InvertedNoise:
    """NOISE: with it a sampler begins at the noisy end of a path.

    samples: [images, channels, height, width] in host RAM, in units of the sampler's noise.
    """

    samples: torch.Tensor
    seed = 0

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        """The noise for this LATENT, whose images must be those of the path, or any number for one.

        Raises ValueError for another size or number.
        """
        size, own = latent["samples"].shape, self.samples.shape
        if size[1:] != own[1:] or own[0] not in (1, size[0]):
            raise ValueError(
                f"the inversion's noise is of {own[0]} images of {_size(own[1:])}, but latent_image has "
                f"{size[0]} of {_size(size[1:])}: wire the inversion's noise to latent_image"
            )
        return self.samples.expand(size)


def sampler_inputs(
    model: ModelPatcher, samples: torch.Tensor, inversion: Inversion
) -> tuple[torch.Tensor, InvertedNoise]:
    """The latent and the NOISE with which the host's sampler begins at the noisy end of the path.

    samples: what was inverted, as a VAE gives it.

    On a flow model, whose sampler scales the latent down to nothing at sigma 1, the clean latent and the
    noise that leads to the path's end. On others the noisy latent, and no noise.
    """
    end, sampling = inversion.trajectory[0], model.get_model_object("model_sampling")
    if not isinstance(sampling, CONST):
        return model.model.process_latent_out(end.clone()), InvertedNoise(torch.zeros_like(end))
    return samples, InvertedNoise(noise_between(sampling, inversion.sigmas[0], inversion.trajectory[-1], end))


def _scale(model: ModelPatcher) -> int:
    latent_format: Any = model.get_model_object("latent_format")
    return latent_format.spacial_downscale_ratio


def _checked(
    model: ModelPatcher, samples: torch.Tensor, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent, and `sigmas` on the CPU. Raises ValueError for invalid inputs."""
    readable_of(model.model.diffusion_model)
    samples = read_samples("latent", samples, model)
    if torch.count_nonzero(samples) == 0:
        raise ValueError("latent is empty: encode the image to edit with VAEEncode")
    sigmas = sigmas.detach().cpu().float()
    if len(sigmas) == 0:
        raise ValueError("sigmas are none: the scheduler's denoise is 0, so there is nothing to sample")
    if len(sigmas) < 2 or sigmas[-1] != 0 or not bool((sigmas[:-1] > sigmas[1:]).all()):
        shown = ", ".join(f"{value:.3f}" for value in sigmas[:6].tolist()) + (
            " ..." if len(sigmas) > 6 else ""
        )
        raise ValueError(
            f"sigmas must fall step by step to 0 but are {shown}: use a scheduler's SIGMAS, or the low part "
            "of split ones"
        )
    return samples, sigmas


def share_calls(sigmas: torch.Tensor, refine: int) -> list[int]:
    """How many model calls each step gets, from the first after the clean image to the noise: at least one,
    and 1 + refine on average.

    sigmas: [steps + 1], falling to 0, on the CPU.

    Each call goes to the step that has most error left. A step's error is taken to be the root of its length
    in sigma at first, and each call to leave 1 - sigma_below / sigma_above of it, at most 2/3. This rule is
    our own, chosen by measurement on a trained and a random network.
    """
    rising = sigmas.flip(0).tolist()
    calls = [1] * (len(rising) - 1)
    left = []
    for step, (below, above) in enumerate(itertools.pairwise(rising)):
        factor = min(1 - below / above, 2 / 3)
        left.append((-factor * (above - below) ** 0.5, step, factor))  # the heap's first is the least
    heapq.heapify(left)
    for _ in range(refine * len(calls)):
        most, step, factor = left[0]
        calls[step] += 1
        heapq.heapreplace(left, (most * factor, step, factor))
    return calls


def _sample_upwards(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    calls: list[int],
    path: list[torch.Tensor],
) -> torch.Tensor:
    extra_args = extra_args or {}
    guider = model.inner_model
    check_entries(readable_of(guider.inner_model.diffusion_model), guider.conds["positive"])
    runs = NetworkRuns()
    options = runs.attach(extra_args.get("model_options", {}))
    rising = sigmas.flip(0)
    rows = x.new_ones([x.shape[0]])
    slope = last = torch.zeros_like(x)
    x = model.latent_image  # the host's scaling for noise leaves nothing of it on a flow model
    path.append(x)
    for i in model_trange(len(rising) - 1, disable=disable):
        sigma, rise = rising[i + 1], rising[i + 1] - rising[i]
        slope, last = (2 * slope - last, slope) if i > 1 else (slope, slope)
        before: tuple[torch.Tensor, torch.Tensor] | None = None
        for _ in range(calls[i]):
            reached = x + slope * rise
            (denoised,) = comfy.samplers.calc_cond_batch(
                guider.inner_model, [guider.conds["positive"]], reached, sigma * rows, options
            )
            runs.check()
            found = (reached - denoised) / sigma
            before, slope = (slope, found), mixed_slope(slope, found, before)
        x = x + slope * rise
        path.append(x)
        if callback is not None:
            callback({"i": i, "denoised": denoised, "x": x, "sigma": sigma, "sigma_hat": sigma})
    return x


def mixed_slope(
    slope: torch.Tensor, found: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """The next slope by Anderson's method of depth 1, for each image by itself.

    slope, found: what went into a call and what came out. before: the same of the step's call before, if any.
    """
    if before is None:
        return found
    rest = found - slope
    change = rest - (before[1] - before[0])
    share = _inner(rest, change) / _inner(change, change).clamp(min=torch.finfo(torch.float32).tiny)
    return found - share * (found - before[1])


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _check_finite(trajectory: torch.Tensor) -> None:
    """trajectory: [steps + 1, ...], from noise to the clean latent."""
    finite = trajectory.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        steps = len(trajectory) - 1
        first = steps - int((~finite).nonzero().max())
        raise ValueError(
            f"the path is not finite from step {first} of {steps} on (counted from the image): the "
            "network's prediction is no number there. Nodes that change the network do that (attention "
            "patches, model function wrappers, a ControlNet or LoRA at a high strength), and so does fp16 "
            "where a model overflows: take such a node out of the model's chain, or load the model in bf16 "
            "or fp32"
        )


def _size(shape: Any) -> str:
    if len(shape) != 3:
        return f"shape {[*shape]} an image"
    channels, height, width = shape
    return f"{width}x{height} ({channels} channels)"
