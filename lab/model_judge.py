"""Judges an edit by the edited model itself, where no CLIP and no DINO are there.

- `own_text`: whether the edit description predicts the picture better than the source description does, the
  idea of Diffusion Classifier (arXiv 2303.16203).
- `own_structure`: how much the self-attention differs from the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ..patches.attention.layers import structure_layers
from ..patches.attention.networks import unet_of
from ..patches.attention.projections import Projections
from ..patches.attention.recorder import AttentionRecorder, active_entry, record
from ..patches.unify.settings import UnifyOptions

LEVELS = (0.4, 0.6, 0.8)  # parts of the sampling at whose noise the predictions are compared
DRAWS = 2  # of noise at each
LOW = 0.95  # the part of the sampling at whose noise attention is read
Conditioning = list[Any]
# The denoised latent at a part of the sampling, with a description, by name, and noise.
Predict = Callable[[str, float, torch.Tensor, AttentionRecorder], torch.Tensor]


def text_fit(model: ModelPatcher, latent: torch.Tensor, source: Conditioning, edit: Conditioning) -> float:
    """-1 to 1, above 0 if the edit description predicts the picture better than the source description: the
    difference of the squared errors of the two predictions over their sum.

    latent: [1, channels, height, width] as a VAE gives it.
    """
    network = unet_of(model.model.diffusion_model, "calibration")
    errors = {"source": 0.0, "edit": 0.0}

    def compare(clean: torch.Tensor, predict: Predict) -> None:
        generator = torch.Generator().manual_seed(0)
        for part in LEVELS:
            for _ in range(DRAWS):
                noise = torch.randn(clean.shape, generator=generator).to(clean)
                for name in errors:
                    denoised = predict(name, part, noise, AttentionRecorder(network, (), ()))
                    errors[name] += float((denoised - clean).square().mean())

    _run(model, latent, {"source": source, "edit": edit}, compare)
    return (errors["source"] - errors["edit"]) / (errors["source"] + errors["edit"])


def structure_maps(model: ModelPatcher, latent: torch.Tensor, text: Conditioning) -> dict[str, Projections]:
    """Self-attention at little noise, by layer, of at most 32 x 32 tokens or the coarsest.

    latent: as in `text_fit`.
    """
    network = unet_of(model.model.diffusion_model, "calibration")
    height, width = latent.shape[-2:]
    layers = structure_layers(network.layers.values(), height, width, UnifyOptions.max_self_attn_res)
    recorder = AttentionRecorder(network, layers, ())
    _run(
        model,
        latent,
        {"text": text},
        lambda clean, predict: predict("text", LOW, torch.zeros_like(clean), recorder),
    )
    return dict(recorder.self_attention)


def structure_change(before: Mapping[str, Projections], after: Mapping[str, Projections]) -> float:
    """Mean squared difference of two pictures' maps, times 1000."""
    layers = []
    for key, maps in before.items():
        changed = sum(
            float((maps.probabilities(piece) - after[key].probabilities(piece)).square().sum())
            for piece in maps.pieces()
        )
        layers.append(changed / (maps.heads * maps.q.shape[1] ** 2))
    return 1000 * sum(layers) / len(layers)


def _run(
    model: ModelPatcher,
    latent: torch.Tensor,
    texts: Mapping[str, Conditioning],
    read: Callable[[torch.Tensor, Predict], Any],
) -> None:
    """Call `read` with the latent in the model's space and its predictions, inside a run of the host."""
    sampling: Any = model.get_model_object("model_sampling")

    def inside(
        wrap: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **_: Any
    ) -> torch.Tensor:
        guider, options = wrap.inner_model, extra_args["model_options"]
        clean = guider.inner_model.process_latent_in(latent).to(x)

        def predict(name: str, part: float, noise: torch.Tensor, recorder: AttentionRecorder) -> torch.Tensor:
            sigma = sampling.percent_to_sigma(part)
            at = x.new_full((len(x),), sigma)
            noisy = sampling.noise_scaling(at.view(-1, 1, 1, 1), noise, clean)
            entry = active_entry(guider.conds[name], sigma)
            assert entry is not None
            return record(guider.inner_model, recorder, entry, noisy, at, options)[0]

        read(clean, predict)
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(dict(texts))
    start, sigmas = torch.zeros_like(latent), torch.tensor([sampling.percent_to_sigma(LOW), 0.0])
    guider.sample(start, start, comfy.samplers.KSAMPLER(inside), sigmas, disable_pbar=True, seed=0)
