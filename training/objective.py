"""What a bridge learns (DescriptiveEdit, arXiv 2508.20505): to denoise the edited image with the source as
reference.

Only the edited latent is noised. The reference stays clean and is read at timestep 0, so each has a noise
level of its own (Diffusion Forcing). Text and image are dropped at random, so that the bridge learns every
prediction that dual guidance needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..patches.attention.networks import unet_of
from ..patches.bridge.core import DenoisePatches, Features, ReferenceCache
from ..patches.host.checkpointing import checkpointed
from .settings import Objective

# What the channels beside the latent are for, by how many they are.
_MORE_CHANNELS = {5: "an inpainting model", 4: "an instruct-pix2pix model"}


@dataclass(frozen=True, eq=False)
class Batch:
    """Encoded pairs of one size.

    source, edit: latents in the model's own space, [pairs, channels, height, width].
    source_text, edit_text: [pairs, tokens, width].
    empty_text: [1, tokens, width].
    white: a white image's latent, [1, channels, height, width].
    """

    source: torch.Tensor
    edit: torch.Tensor
    source_text: torch.Tensor
    edit_text: torch.Tensor
    empty_text: torch.Tensor
    white: torch.Tensor


@dataclass(frozen=True, eq=False)
class NoiseSample:
    """The random values of a forward.

    timesteps: [pairs].
    noise: as the latents.
    no_text, no_image: [pairs] of bool, where the text or the image is dropped.
    no_edit: [pairs] of bool, where the target is the reference itself.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    no_text: torch.Tensor
    no_image: torch.Tensor
    no_edit: torch.Tensor


def check_trainable(model: ModelPatcher) -> None:
    """Raises ValueError for a model that cannot be trained.

    Its UNet takes more than a latent and a text, or it predicts neither noise nor v at the UNet's own
    timesteps.
    """
    unet = unet_of(model.model.diffusion_model, "training a bridge").module
    family = type(model.model.model_config).__name__
    channels = model.get_model_object("latent_format").latent_channels
    if unet.in_channels != channels:
        kind = _MORE_CHANNELS.get(unet.in_channels - channels, "a model for another purpose")
        raise ValueError(
            f"this {family} takes {unet.in_channels} channels where a latent has {channels}: it is "
            f"{kind}, which cannot be trained; use the plain base model"
        )
    if unet.num_classes is not None:
        raise ValueError(
            f"{family} is a model with pooled text (SDXL), which cannot be trained yet: use SD1.x or SD2.x"
        )
    known = comfy.model_sampling
    sampling: Any = model.get_model_object("model_sampling")
    predicts = type(sampling).calculate_denoised
    last = len(getattr(sampling, "sigmas", ())) - 1
    if (
        predicts not in (known.EPS.calculate_denoised, known.V_PREDICTION.calculate_denoised)
        or last < 1
        or round(float(sampling.timestep(sampling.sigmas[-1]))) != last
    ):
        kinds = ", ".join(base.__name__ for base in type(sampling).__bases__)
        raise ValueError(
            f"the sampling of this MODEL ({kinds}) cannot be trained: it must predict noise (eps) or "
            "v at the base model's own timesteps. Take out the node that changed it"
        )


def sample_noise(
    objective: Objective, seeds: Sequence[int], shape: Sequence[int], timesteps: int
) -> NoiseSample:
    """One sample per seed, on the CPU: the same for a pair however a batch is split.

    shape: of one latent.
    timesteps: number of timesteps of the schedule.
    """
    times, noises, texts, images, edits = [], [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        times.append(torch.randint(timesteps, (), generator=generator))
        noise = torch.randn(*shape, generator=generator)
        first, second = torch.rand(2, generator=generator).tolist()
        if objective.offset_noise:
            noise += objective.offset_noise * torch.randn(shape[0], 1, 1, generator=generator)
        noises.append(noise)
        rate = objective.drop_rate
        match objective.dropout:
            case "paper":
                text, image, edit = first < rate, second < rate, False
            case "release":
                edit = first < rate
                text, image = edit or 2 * rate <= first < 3 * rate, rate <= first < 3 * rate
            case _:
                text = image = edit = False
        texts.append(text)
        images.append(image)
        edits.append(edit)
    return NoiseSample(
        torch.stack(times),
        torch.stack(noises),
        *(torch.tensor(values) for values in (texts, images, edits)),
    )


def losses(
    model: BaseModel,
    cache: ReferenceCache,
    batch: Batch,
    sample: NoiseSample,
    objective: Objective,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Each pair's loss, [pairs], with a gradient for the bridge where one is enabled.

    model: its UNet predicts noise or v.
    checkpointing: layers are computed again for their gradient instead of kept; `cache` must then not be used
        for anything else before that.
    """
    device, sampling, unet = batch.edit.device, model.model_sampling, model.diffusion_model
    no_image, no_text = sample.no_image.to(device), sample.no_text.to(device)
    steps, noise = sample.timesteps.to(device), sample.noise.to(batch.edit)
    target = torch.where(_wide(sample.no_edit.to(device)), batch.source, batch.edit)
    sigma = _wide(sampling.sigmas.to(device)[steps]).to(target)
    kept = 1 / (1 + sigma.square())  # the schedule's cumulative alpha
    noised = kept.sqrt() * target + (1 - kept).sqrt() * noise

    reference, reference_text = batch.source, batch.source_text
    rows: slice | torch.Tensor | None = slice(0, len(target))
    if objective.dropped_image == "white":
        reference = torch.where(_wide(no_image), batch.white, reference)
        reference_text = torch.where(no_image[:, None, None], batch.empty_text, reference_text)
    elif sample.no_image.any():
        rows = (~sample.no_image).nonzero().flatten().to(device) if not sample.no_image.all() else None
    times = steps.float() if objective.reference_time == "same" else None
    text = torch.where(no_text[:, None, None], batch.empty_text, batch.edit_text)

    options = {"cond_or_uncond": [0], "uuids": [None], "sigmas": sigma.flatten()}
    options["optimized_attention_override"] = _torch_attention
    if checkpointing:
        options = checkpointed(options, unet)
    dtype = model.get_dtype_inference()
    cache.read(reference.to(dtype), options, timesteps=times, context=reference_text.to(dtype))

    def features(key: str) -> Features:
        return tuple(of_pairs[rows] for of_pairs in cache.features[key])

    options = DenoisePatches(cache, rows, noised, features).install(options)
    output = unet(
        noised.to(dtype), steps.float(), context=text.to(dtype), control=None, transformer_options=options
    )
    learned = noise
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        learned = kept.sqrt() * noise - (1 - kept).sqrt() * target
    error = (output.float() - learned).square().mean((1, 2, 3))
    if objective.min_snr:
        snr = (kept / (1 - kept)).flatten()
        divisor = snr + 1 if learned is not noise else snr
        error = error * snr.clamp(max=objective.min_snr) / divisor
    return error


def _torch_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention by torch: the host's choice may have no derivative."""
    return attention_pytorch(*args, **kwargs)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """[pairs] -> [pairs, 1, 1, 1]."""
    return values[:, None, None, None]
