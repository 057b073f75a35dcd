"""Where the words of a description look, layer by layer, in scenes of two objects.

For each cross-attention layer and each kind of word (shape, colour, texture): how well the attention to the
word tells its object from the rest of the image, and from the other object, as the area under the ROC curve.
0.5 is chance, 1 is perfect. Attention is the mean of the probabilities over heads, or that of one head,
half-way through sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import comfy.model_management
import numpy as np
import torch
from einops import rearrange
from scipy.stats import mannwhitneyu

from ...models.tiny_studio import drawing, scenes, words
from ...patches.attention.networks import unet_of
from ...patches.attention.recorder import AttentionRecorder
from .studio import Batch, Studio

Place = tuple[str, str]  # key of a layer, or a head of it; kind of word


def word_tokens(scene: scenes.Scene, text: str) -> dict[tuple[str, str], list[int]]:
    """The tokens in `text` of each object's words, by side and attribute; the start mark is token 0."""
    found, side, token = {}, 0, 1
    for word in text.split():
        count = len(words.tokens(word)) - 2
        side += word == "and"
        for name in scenes.OWN:
            if side < 2 and scene.values[f"{scenes.SIDES[side]}_{name}"] == word:
                found[scenes.SIDES[side], name] = list(range(token, token + count))
        token += count
    return found


def roc_area(scores: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> float:
    """The chance that a positive has a higher score than a negative; a draw counts half."""
    inside, outside = scores[positive].numpy(), scores[negative].numpy()
    return float(mannwhitneyu(inside, outside).statistic) / (len(inside) * len(outside))


@torch.inference_mode()
def attention_by_layer(tiny: Studio, batch: Batch) -> dict[str, torch.Tensor]:
    """The attention of the sources to their descriptions by layer, [cases, heads, rows, columns, tokens]."""
    model = tiny.model.model
    network = unet_of(model.diffusion_model, "the study of words")
    layers = list(network.layers.values())
    comfy.model_management.load_model_gpu(tiny.model)
    sampling, device = model.model_sampling, tiny.model.load_device
    sigma = torch.as_tensor(sampling.percent_to_sigma(0.5), device=device, dtype=torch.float32)
    latent = model.process_latent_in(batch.latent).to(device) + sigma * batch.noise.to(device)
    recorder = AttentionRecorder(network, (), layers)
    model.apply_model(
        latent,
        sigma.expand(len(batch)),
        c_crossattn=batch.source_text.to(device),
        transformer_options=recorder.attach(tiny.model.model_options)["transformer_options"],
    )
    grids = {layer.key: layer.grid(*batch.latent.shape[-2:]) for layer in layers}
    return {
        key: rearrange(found.probabilities(), "b e (h w) t -> b e h w t", h=grids[key][0])
        for key, found in recorder.cross_attention.items()
    }


def localisation(
    tiny: Studio, batch: Batch, by_head: Collection[str] = ()
) -> dict[Place, tuple[float, float]]:
    """The mean areas of all words: object against rest, and object against the other object.

    by_head: keys of layers whose heads, `KEY head 0` and so on, are looked at one by one, too.
    """
    areas: dict[Place, list[tuple[float, float]]] = defaultdict(list)
    maps = {}
    for key, attention in attention_by_layer(tiny, batch).items():
        maps[key] = attention.mean(1)
        if key in by_head:
            maps |= {f"{key} head {number}": one for number, one in enumerate(attention.unbind(1))}
    for key, attention in maps.items():
        for row, pair in enumerate(batch.pairs):
            objects = [drawing.foreground(one, 0.0) for one in pair.source.objects()]
            masks = dict(zip(scenes.SIDES, (_on_grid(o, attention.shape[1:3]) for o in objects), strict=True))
            for (side, name), tokens in word_tokens(pair.source, pair.source_text).items():
                (other,) = (mask for of, mask in masks.items() if of != side)
                own = masks[side]
                if not own.any() or not other.any():
                    continue  # a coarse grid
                scores = attention[row, :, :, tokens].mean(-1).cpu()
                areas[key, name].append((roc_area(scores, own, ~own), roc_area(scores, own, other & ~own)))
    return {place: tuple(np.mean(found, axis=0).tolist()) for place, found in areas.items()}


def _on_grid(mask: np.ndarray, grid: Any) -> torch.Tensor:
    """The cells of which an object covers at least half."""
    rows, columns = grid
    cells = rearrange(torch.from_numpy(mask), "(r a) (c b) -> r c (a b)", r=rows, c=columns)
    return cells.float().mean(-1) >= 0.5
