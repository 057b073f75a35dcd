"""Captures what a network attends to at one point of the sampling, as maps for display."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange, reduce
from kornia.color import ColorMap
from kornia.geometry.transform import resize

from ...pictures.contact_sheet import draw_sheet
from ..host.inputs import read_samples
from ..host.options import one_device
from ..host.sigmas import progress
from ..inversion import Inversion
from ..unify.tokens import EditTokens
from .checks import check_order
from .networks import readable_of
from .projections import Projections
from .recorder import AttentionRecorder, active_entry, record

_COMPONENTS = 3


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Maps of one model call.

    words: for each word a map, [images, rows, columns]: the probability that an image token attends to the
    word, averaged over heads, layers and the word's tokens.
    structure: [images, rows, columns, 3], 0 to 1: the three leading components of self-attention.
    """

    words: dict[str, torch.Tensor]
    structure: torch.Tensor


@dataclass(frozen=True, eq=False)
class LatentSource:
    """The latent whose attention is captured: a clean one with noise added, or a step of an inversion.

    percent: 0 is pure noise, 1 the clean image; of an inversion the nearest step is taken.
    samples: [images, channels, height, width] as a VAE gives it. Exactly one of samples and inversion is
        given.
    inversion: the path.
    seed: of the noise that is added to samples.
    """

    percent: float
    samples: torch.Tensor | None = None
    inversion: Inversion | None = None
    seed: int = 0


def capture_attention(
    model: ModelPatcher,
    conditioning: list[Any],
    tokens: EditTokens,
    source: LatentSource,
    cross_attn_res: int,
    self_attn_res: int,
) -> AttentionMaps:
    """Run the model once and read its attention.

    conditioning: of the description in which the tokens were found. Of several entries the first for the
    whole image at this noise level is used.
    cross_attn_res, self_attn_res: tokens per side; the model's nearest grid is used, on DiTs a coarser one.

    Raises ValueError for inputs that do not belong together.
    """
    network = readable_of(model.model.diffusion_model)
    if (source.samples is None) == (source.inversion is None):
        raise ValueError("connect either latent or inversion, and not both")
    if source.inversion is None:
        step, (noise, samples, sigma) = 0, _noised(model, source)
    else:
        step, sigma = _nearest(model, source.inversion, source.percent)
        samples = noise = torch.zeros(source.inversion.trajectory.shape[1:])
    height, width = samples.shape[-2:]
    kind = type(model.model.model_config).__name__
    cross, structure = (
        network.word_layers(height, width, res, kind=kind) for res in (cross_attn_res, self_attn_res)
    )
    offsets: list[int] = []
    recorder = AttentionRecorder(network, structure, cross, stop=True)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    sampler = comfy.samplers.KSAMPLER(
        _record_once,
        {
            "recorder": recorder,
            "inversion": source.inversion,
            "step": step,
            "found": lambda entry: offsets.append(network.text_offset(entry)),
        },
    )
    guider.sample(noise, samples, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=source.seed)
    return AttentionMaps(
        _word_maps(recorder.cross_attention.values(), tokens, cross[0].places(height, width), offsets[0]),
        _components(_mean(recorder.self_attention.values()), structure[0].places(height, width)),
    )


def _noised(model: ModelPatcher, source: LatentSource) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Noise, clean latent and sigma."""
    sampling: Any = model.get_model_object("model_sampling")
    samples = read_samples("latent", source.samples, model)
    sigma = min(sampling.percent_to_sigma(source.percent), float(sampling.sigma_max))
    return comfy.sample.prepare_noise(samples, source.seed), samples, sigma


def _nearest(model: ModelPatcher, inversion: Inversion, percent: float) -> tuple[int, float]:
    """The path's step nearest to `percent`, and its sigma."""
    inversion.check(model, torch.Size(inversion.trajectory.shape[1:]), inversion.sigmas)
    along = progress(model.get_model_object("model_sampling"), inversion.sigmas[:-1])
    step = int((along - percent).abs().argmin())
    return step, float(inversion.sigmas[step])


def _record_once(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    recorder: AttentionRecorder,
    inversion: Inversion | None,
    step: int,
    found: Callable[[dict[str, Any]], None],
) -> torch.Tensor:
    """A sampler function that runs the model once without changing the latent.

    found: gets the conditioning entry that it ran with.
    """
    guider, options = model.inner_model, (extra_args or {})["model_options"]
    if inversion is not None:
        x = inversion.latent(step, x)
    entry = active_entry(guider.conds["positive"], float(sigmas[0]))
    if entry is None:
        raise ValueError(
            "conditioning has no entry for the whole image at this percent: wire the description "
            "without an area, a mask or a range of steps"
        )
    found(entry)
    options = one_device(options)
    record(guider.inner_model, recorder, entry, x, sigmas[0] * x.new_ones([len(x)]), options, own_grid=True)
    check_order(recorder.moved)
    return x


def _mean(attention: Collection[Projections]) -> torch.Tensor:
    """Probabilities, [images, queries, columns], averaged over heads and layers of one grid."""
    first, *others = (layer.mean() for layer in attention)
    return sum(others, first) / len(attention)


def _word_maps(
    attention: Collection[Projections], tokens: EditTokens, grid: tuple[int, int], offset: int
) -> dict[str, torch.Tensor]:
    if not tokens.words or not all(word.tokens for word in tokens.words):
        raise ValueError("edit_tokens has no words: find the words of the edit first")
    mean = _mean(attention)[..., offset:]
    last, context = max(max(word.tokens) for word in tokens.words), mean.shape[-1]
    if last >= context:
        raise ValueError(
            f"edit_tokens has token {last} but conditioning has {context} tokens: encode the "
            "description that the tokens were found in"
        )
    # A word that occurs twice has a map for each occurrence.
    texts = [word.text for word in tokens.words]
    return {
        f"{word.text} ({word.tokens[0]})" if texts.count(word.text) > 1 else word.text: rearrange(
            mean[..., list(word.tokens)].mean(dim=-1), "b (h w) -> b h w", h=grid[0], w=grid[1]
        )
        for word in tokens.words
    }


def _components(attention: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The leading principal components of each token's row of self-attention, each scaled to 0..1 and its
    strongest token bright, [images, rows, columns, 3] (Tumanyan et al., arXiv 2211.12572, show features so).
    """
    centred = attention - attention.mean(dim=1, keepdim=True)
    left, strength, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = left[..., :_COMPONENTS] * strength[:, None, :_COMPONENTS]
    strongest = scores.gather(1, scores.abs().argmax(dim=1, keepdim=True))
    scores = scores * strongest.sign()
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    scores = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    return rearrange(scores, "b (h w) c -> b h w c", h=grid[0], w=grid[1]).cpu()


def draw_maps(
    maps: AttentionMaps, image: torch.Tensor | None, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps as two IMAGEs: the words' maps on a contact sheet, and the structure.

    image: what the words' maps are laid over, [images or 1, height, width, 3], 0 to 1; None for black.
    side: of each map's longer side, in pixels.

    Raises ValueError for another number of images than there are maps.
    """
    rows, height, width, _ = maps.structure.shape
    if image is not None and len(image) not in (1, rows):
        raise ValueError(f"image has {len(image)} images but {rows} are looked at: give one, or {rows}")
    columns = [] if image is None else [("image", image)]
    for word, found in maps.words.items():
        below = found.new_zeros(1, *_size(*found.shape[1:], side), 3) if image is None else image
        columns.append((word, overlay(found, below)))
    structure = rearrange(maps.structure, "b h w c -> b c h w")
    structure = torch.nn.functional.interpolate(structure, _size(height, width, side), mode="nearest")
    return draw_sheet(columns, side), rearrange(structure, "b c h w -> b h w c")


def _size(rows: int, columns: int, side: int) -> tuple[int, int]:
    """Height and width of a map whose longer side is `side` pixels."""
    longer = max(rows, columns)
    return max(1, round(rows * side / longer)), max(1, round(columns * side / longer))


def overlay(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Maps over images: each map from its lowest value, dark blue, to its highest, yellow.

    maps: [images, rows, columns].
    images: [images or 1, height, width, 3], 0 to 1.

    Returns [images, height, width, 3].
    """
    low, high = (reduce(maps, "b h w -> b 1 1", kind) for kind in ("min", "max"))
    scaled = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    scaled = resize(
        rearrange(scaled, "b h w -> b 1 h w"), (images.shape[1], images.shape[2]), interpolation="bilinear"
    )
    colours = ColorMap("plasma", 256, device=maps.device, dtype=maps.dtype).colors
    heat = colours.T[(rearrange(scaled, "b 1 h w -> b h w").clamp(0, 1) * 255).round().long()]
    return 0.4 * images[..., :3].to(heat) + 0.6 * heat
