"""What a bridge learns (DescriptiveEdit, arXiv 2508.20505): to denoise the edited image with the source as
reference. A flow predicts the velocity from image to noise instead of noise or v.

Only the edited latent is noised. The reference stays clean and is read at timestep 0, so each has a noise
level of its own (Diffusion Forcing). Text and image are dropped at random, so that the bridge learns every
prediction that dual guidance needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import SDXL, BaseModel, ModelType
from comfy.model_patcher import ModelPatcher

from ..patches.attention.networks import network_of
from ..patches.bridge.core import DenoisePatches, Features, ReferenceCache
from ..patches.host.checkpointing import checkpointed
from .settings import Objective
from .texts import Text, text_conditions

# What the channels beside the latent are for, by how many they are.
_MORE_CHANNELS = {
    4: "an instruct-pix2pix model",
    5: "an inpainting model",
    16: "a Canny, Depth or instruct model",
    80: "a Fill model",
}


@dataclass(frozen=True, eq=False)
class Batch:
    """Encoded pairs of one size.

    source, edit: latents in the model's own space, [pairs, channels, height, width], or with a frame as the
        host has them.
    source_text, edit_text: of each pair.
    white: a white image's latent, [1, channels, height, width].
    """

    source: torch.Tensor
    edit: torch.Tensor
    source_text: Sequence[Text]
    edit_text: Sequence[Text]
    empty_text: Text
    white: torch.Tensor


@dataclass(frozen=True, eq=False)
class NoiseSample:
    """The random values of a forward.

    timesteps: [pairs]; of a flow the share of noise, 0 to 1.
    noise: as the latents.
    no_text, no_image: for each pair, whether its text or its image is dropped.
    no_edit: for each pair, whether the target is the reference itself.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    no_text: Sequence[bool]
    no_image: Sequence[bool]
    no_edit: Sequence[bool]


def is_flow(model: BaseModel) -> bool:
    """Whether the model was trained to predict a velocity (rectified flow) instead of noise."""
    return model.model_type in (ModelType.FLOW, ModelType.FLUX)


def check_trainable(model: ModelPatcher) -> None:
    """Raises ValueError for a model that cannot be trained.

    Its network takes more than a latent, a text and pooled text, or its sampling is not the base's own.
    """
    network = network_of(model.model.diffusion_model)
    family = type(model.model.model_config).__name__
    channels: Any = model.get_model_object("latent_format").latent_channels
    if network.channels != channels:
        kind = _MORE_CHANNELS.get(network.channels - channels, "a model for another purpose")
        raise ValueError(
            f"this {family} takes {network.channels} channels where a latent has {channels}: it is "
            f"{kind}, which cannot be trained; use the plain base model"
        )
    pooled = getattr(network.module, "num_classes", None) is not None
    if pooled and not isinstance(model.model, SDXL):
        raise ValueError(
            f"{family} takes more than a text (an image, or a score), which cannot be trained: use SD1.x, "
            "SD2.x, SDXL, Flux, Chroma, SD3.5 or Qwen-Image"
        )
    known = comfy.model_sampling
    sampling: Any = model.get_model_object("model_sampling")
    predicts, flow = type(sampling).calculate_denoised, is_flow(model.model)
    last = len(getattr(sampling, "sigmas", ())) - 1
    if flow:
        fits = predicts is known.CONST.calculate_denoised
    else:
        fits = (
            predicts in (known.EPS.calculate_denoised, known.V_PREDICTION.calculate_denoised)
            and last >= 1
            and round(float(sampling.timestep(sampling.sigmas[-1]))) == last
        )
    if not fits:
        kinds = ", ".join(base.__name__ for base in type(sampling).__bases__)
        must = "the velocity of a flow" if flow else "noise (eps) or v at the base model's own timesteps"
        raise ValueError(
            f"the sampling of this MODEL ({kinds}) cannot be trained: it must predict {must}. Take out the "
            "node that changed it"
        )


def check_objective(model: BaseModel, objective: Objective) -> None:
    """Raises ValueError for an objective that the model's sampling does not have."""
    if objective.min_snr and is_flow(model):
        raise ValueError(
            f"min_snr is {objective.min_snr:g} but {type(model.model_config).__name__} is a flow, which "
            "has no such weights: set it to 0"
        )


def sample_noise(
    objective: Objective, seeds: Sequence[int], shape: Sequence[int], timesteps: int | None
) -> NoiseSample:
    """One sample per seed, on the CPU: the same for a pair however a batch is split.

    shape: of one latent.
    timesteps: number of timesteps of the schedule, which are drawn uniformly; None for a flow, whose share of
        noise is the sigmoid of a normal value (Esser et al., arXiv 2403.03206).
    """
    times, noises, texts, images, edits = [], [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        if timesteps is None:
            times.append(torch.randn((), generator=generator).sigmoid())
        else:
            times.append(torch.randint(timesteps, (), generator=generator))
        noise = torch.randn(*shape, generator=generator)
        first, second = torch.rand(2, generator=generator).tolist()
        if objective.offset_noise:
            noise += objective.offset_noise * torch.randn(
                shape[0], *[1] * (len(shape) - 1), generator=generator
            )
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
    return NoiseSample(torch.stack(times), torch.stack(noises), texts, images, edits)


def losses(
    model: BaseModel,
    cache: ReferenceCache,
    batch: Batch,
    sample: NoiseSample,
    objective: Objective,
    checkpointing: bool = False,
) -> torch.Tensor:
    """Each pair's loss, [pairs], with a gradient for the bridge where one is enabled; of a DiT only inside
    `gradients`.

    model: its network predicts noise, v or, if it is a flow, noise - image.
    checkpointing: layers are computed again for their gradient instead of kept; `cache` must then not be used
        for anything else before that.
    """
    network = cache.network
    target = _chosen(sample.no_edit, batch.source, batch.edit)
    noised = _noised(model, target, sample, objective)

    reference, reference_text = batch.source, batch.source_text
    rows: slice | torch.Tensor | None = slice(0, len(target))
    if objective.dropped_image == "white":
        reference = _chosen(sample.no_image, batch.white.expand_as(reference), reference)
        reference_text = _without(sample.no_image, reference_text, batch.empty_text)
    elif any(sample.no_image):
        seen = [pair for pair, no in enumerate(sample.no_image) if not no]
        rows = torch.tensor(seen, device=target.device) if seen else None
    times = noised.timesteps if objective.reference_time == "same" else None
    text = _without(sample.no_text, batch.edit_text, batch.empty_text)

    options = {"cond_or_uncond": [0], "uuids": [None], "sigmas": noised.sigmas}
    options["optimized_attention_override"] = _torch_attention
    if checkpointing:
        options = checkpointed(options, network.module)
    dtype = model.get_dtype_inference()

    def features(key: str) -> Features:
        return tuple(of_pairs[rows] for of_pairs in cache.features[key])

    read = text_conditions(model, network, reference_text, reference)
    called = text_conditions(model, network, text, target)
    cache.read(reference.to(dtype), options, timesteps=times, **read)
    options = DenoisePatches(cache, rows, noised.latents, features).install(options)
    output = network.module(
        noised.latents.to(dtype), noised.timesteps, control=None, transformer_options=options, **called
    )
    return noised.weights * (output.float() - noised.learned).square().mean(tuple(range(1, output.ndim)))


class _Noised(NamedTuple):
    """What the network gets, and what it learns to predict of it.

    latents: its input, [pairs, channels, height, width].
    timesteps, sigmas: [pairs].
    learned: as the latents.
    weights: of the loss, [pairs].
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    learned: torch.Tensor
    weights: torch.Tensor


def _noised(model: BaseModel, target: torch.Tensor, sample: NoiseSample, objective: Objective) -> _Noised:
    """Noise added to the target by the model's own sampling."""
    sampling: Any = model.model_sampling
    times, noise = sample.timesteps.to(target.device), sample.noise.to(target)
    if is_flow(model):
        latents = sampling.noise_scaling(times, noise, target)
        whole = torch.ones_like(times)
        learned = sampling.noise_scaling(whole, noise, target) - target
        return _Noised(latents, sampling.timestep(times), times, learned, whole)
    sigmas = sampling.sigmas.to(target.device)[times].to(target)
    kept = 1 / (1 + sigmas.square())  # the schedule's cumulative alpha
    signal, share = _wide(kept.sqrt()), _wide((1 - kept).sqrt())
    v = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
    weights = torch.ones_like(sigmas)
    if objective.min_snr:
        snr = kept / (1 - kept)
        weights = snr.clamp(max=objective.min_snr) / (snr + 1 if v else snr)
    learned = signal * noise - share * target if v else noise
    return _Noised(signal * target + share * noise, times.float(), sigmas, learned, weights)


def _chosen(which: Sequence[bool], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """For each pair of `first` where `which` is true, else of `second`."""
    chosen = torch.tensor(which, device=second.device).view(-1, *[1] * (second.ndim - 1))
    return torch.where(chosen, first, second)


def _without(dropped: Sequence[bool], texts: Sequence[Text], empty: Text) -> list[Text]:
    """The texts, the empty one where they are dropped."""
    return [empty if no else text for no, text in zip(dropped, texts, strict=True)]


def _torch_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention by torch: the host's choice may have no derivative."""
    return attention_pytorch(*args, **kwargs)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """[pairs] -> [pairs, 1, 1, 1]."""
    return values[:, None, None, None]
