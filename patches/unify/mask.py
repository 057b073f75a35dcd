"""Finds an edit mask from where the edit's words attend (the idea of Prompt-to-Prompt's LocalBlend)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from einops import einsum, rearrange
from kornia.geometry.transform import resize

from ..attention.layers import AttentionLayer
from ..attention.networks import readable_of
from ..attention.projections import Projections
from ..attention.recorder import AttentionRecorder, active_entry, record, whole_image
from ..host.inputs import read_samples
from ..host.options import one_device
from ..inversion import invert_virtually
from .plan import Step
from .source import Source
from .tokens import EditTokens
from .words import Words, edit_words, source_words

THRESHOLD = 0.3  # LocalBlend's
# Where the path is read: the image exists there and still follows the words.
PROGRESS = (0.5, 0.7, 0.9)


def find_mask(
    source: Source,
    target: Sequence[dict[str, Any]],
    tokens: Sequence[EditTokens],
    layers: Sequence[AttentionLayer],
    plan: Sequence[Step],
    x: torch.Tensor,
) -> torch.Tensor:
    """Where the edit's words, and the words they replace in the source description, attend in the inverted
    image.

    target: the edit description as the model takes it.
    tokens: one for all rows, or one for each.
    layers: cross-attentions to read.
    plan: the steps of the inversion.
    x: any latent of the sampling, [rows, channels, height, width].

    Returns [rows, height, width] of 0 and 1 on the latent's grid.
    """
    height, width = x.shape[-2:]
    found: list[torch.Tensor] = []
    for wanted in PROGRESS:
        step = min(range(len(plan)), key=lambda i: abs(plan[i].progress - wanted))
        sigma = plan[step].sigma
        for entry, find in ((active_entry(target, sigma), edit_words), (source.entry(step), source_words)):
            if entry is None:
                continue
            recorder = AttentionRecorder(source.network, (), layers, stop=True)
            latent = source.latent(step, x)
            record(source.model, recorder, entry, latent, x.new_full((len(x),), sigma), source.options)
            attention = recorder.cross_attention
            context = next(iter(attention.values())).columns
            words = find(tokens, context, source.network.text_offset(entry)).to(x.device)
            found.append(word_attention(attention, words, layers, height, width))
    if not found:
        raise ValueError(
            "no description is active where a mask is looked for, the second half of the sampling: take the "
            "time ranges of the descriptions away, or wire a mask"
        )
    return attention_mask(found)


def find_mask_of_image(
    model: ModelPatcher,
    samples: torch.Tensor,
    source: list[Any],
    edit: list[Any],
    tokens: EditTokens,
    cross_attn_res: int,
) -> torch.Tensor:
    """`find_mask` of an image that is not inverted: noise is added to it.

    samples: [images, channels, height, width] as a VAE gives it.
    source, edit: CONDITIONING.
    cross_attn_res: tokens per side; the model's nearest grid is read. 0: as in UnifyOptions.

    Returns [images, height, width] of 0 and 1 in pixels.
    Raises ValueError as `invert_virtually` does, and for an edit description without an entry for the whole
    image.
    """
    samples = read_samples("latent", samples, model)
    sampling: Any = model.get_model_object("model_sampling")
    sigmas = torch.tensor([*(sampling.percent_to_sigma(percent) for percent in PROGRESS), 0.0])
    inversion = invert_virtually(model, samples, source, sigmas, seed=0)
    network = readable_of(model.model.diffusion_model)
    height, width = samples.shape[-2:]
    kind = type(model.model.model_config).__name__
    layers = network.word_layers(height, width, cross_attn_res, kind=kind)
    plan = [Step(float(sigma), at, 0.0, 0.0) for sigma, at in zip(sigmas, PROGRESS, strict=False)]
    found = []

    def read_once(
        wrap: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **_: Any
    ) -> torch.Tensor:
        guider = wrap.inner_model
        if not whole_image(guider.conds["edit"]):
            raise ValueError("edit has no entry for the whole image: wire it without an area or a mask")
        options = one_device(extra_args["model_options"])
        path = inversion.trajectory.to(x.device)
        branch = Source(
            guider.inner_model, network, True, path, sigmas.tolist(), guider.conds["source"], options
        )
        found.append(find_mask(branch, guider.conds["edit"], [tokens], layers, plan, x).cpu())
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"source": source, "edit": edit})
    guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(read_once),
        sigmas,
        disable_pbar=True,
        seed=0,
    )
    height, width = (size * inversion.scale for size in samples.shape[-2:])
    return image_mask(found[0], height, width)


def image_mask(mask: torch.Tensor | None, height: int, width: int) -> torch.Tensor:
    """A mask of any size, or None for the whole image, as [rows or 1, height, width] in pixels."""
    if mask is None:
        return torch.ones(1, height, width)
    return torch.nn.functional.interpolate(mask[:, None], (height, width), mode="nearest")[:, 0]


def word_attention(
    attention: Mapping[str, Projections],
    words: Words,
    layers: Sequence[AttentionLayer],
    height: int,
    width: int,
) -> torch.Tensor:
    """The attention that the words get, averaged over heads, words and layers.

    attention: at each of `layers`; from the places of its maps to the text's tokens.
    height, width: the latent's.

    Returns [rows, height, width], 0 to 1; 0 for a row without words.
    """
    found = []
    for layer in layers:
        probabilities = attention[layer.key].mean()
        # A weighted sum over words: padding has no weight.
        looks = einsum(probabilities, words.tokens, words.weights, "b p t, b w t, b w -> b p")
        rows, columns = layer.places(height, width)
        looks = rearrange(looks, "b (h w) -> b 1 h w", h=rows, w=columns)
        found.append(resize(looks, (height, width), interpolation="bilinear", align_corners=False))
    return rearrange(torch.stack(found).mean(dim=0), "b 1 h w -> b h w")


def attention_mask(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 where attention is high.

    Each map is scaled to 0 to 1 image by image, their average is scaled to 0 to 1 again, and cut at
    THRESHOLD.

    attention: maps of [rows, height, width], one for each reading.

    Returns [rows, height, width] of 0 and 1, with at least one 1 in each row.
    """
    return (_stretch(sum(map(_stretch, attention), torch.zeros(()))) >= THRESHOLD).float()


def _stretch(values: torch.Tensor) -> torch.Tensor:
    least, most = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    return torch.where(most > least, (values - least) / (most - least), torch.ones_like(values))
