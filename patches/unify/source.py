"""UnifyEdit's source branch: the inverted image's latents, run with the source description."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention.layers import AttentionLayer
from ..attention.recorder import AttentionRecorder, Projections, active_entry, record
from ..attention.unet import UNet
from ..inversion import Inversion


@dataclass(frozen=True, eq=False)
class Source:
    """The source branch of one sampling.

    entries: the source description as the model takes it.
    options: the model options of every call.
    denoise_mask: the sampling's noise mask, or None.
    """

    model: BaseModel
    network: UNet
    inversion: Inversion
    entries: list[dict[str, Any]]
    options: dict[str, Any]
    denoise_mask: torch.Tensor | None = None

    def entry(self, step: int) -> dict[str, Any] | None:
        """The description's entry for the whole image that is active at `step`."""
        return active_entry(self.entries, float(self.inversion.sigmas[step]))

    def read(
        self, step: int, x: torch.Tensor, sigma: torch.Tensor, layers: Sequence[AttentionLayer]
    ) -> tuple[Mapping[str, Projections], torch.Tensor | float]:
        """The self-attention at `layers`, and what to add to the denoised prediction of the target.

        x: the target latent, [rows, ...].
        sigma: [rows].

        Stored inversion: nothing is added, and without layers there is no model call. Virtual inversion: the
        source's own prediction should be the clean image x_0; its error is subtracted from the target's, D* +
        (x_0 - D_s). This is InfEdit's x_0 + (x*_t - x^s_t) - sigma (eps* - eps_s) (arXiv 2312.04965) in
        denoised space. If the target is predicted like the source, the result is x_0, exactly.
        """
        entry, virtual = self.entry(step), self.inversion.virtual
        if entry is None or not (layers or virtual):
            return {}, 0.0
        recorder = AttentionRecorder(self.network, layers, (), stop=not virtual)
        latent = self.inversion.latent(step, x)
        (denoised,) = record(self.model, recorder, entry, latent, sigma, self.options)
        if not virtual:
            return recorder.self_attention, 0.0
        error = self.inversion.latent(-1, x) - denoised
        return recorder.self_attention, error if self.denoise_mask is None else error * self.denoise_mask


@contextmanager
def open_source(
    guider: comfy.samplers.CFGGuider,
    network: UNet,
    inversion: Inversion,
    x: torch.Tensor,
    options: dict[str, Any],
    extra_args: dict[str, Any],
    memory: float,
) -> Generator[tuple[Source, list[ModelPatcher]]]:
    """The source branch, and the models that a call runs. Models loaded by the source description
    (ControlNets) are released afterwards.

    guider: the host's, in a run.
    x: the sampled latent, [rows, ...].
    options: the model options of every call.
    memory: bytes that the run needs beyond what the host has reserved.

    Raises ValueError if the inversion is virtual and its description is inactive at a step.
    """
    conds = {"positive": comfy.sampler_helpers.convert_cond(inversion.conditioning)}
    comfy.samplers.preprocess_conds_hooks(conds)
    comfy.samplers.filter_registered_hooks_on_conds(conds, options)
    models, own = comfy.sampler_helpers.get_additional_models(conds, guider.model_patcher.model_dtype())
    patchers = [guider.model_patcher, *guider.loaded_models, *models]
    # As the host does before a sampling, which knew neither of the gradients nor of these models.
    rows, *size = x.shape
    most, least = (guider.inner_model.memory_required([count * rows, *size]) for count in (2, 1))
    comfy.model_management.load_models_gpu(
        patchers,
        memory_required=most + own + memory,
        minimum_memory_required=least + own + memory,
    )
    try:
        denoise_mask = extra_args.get("denoise_mask")
        entries = comfy.samplers.process_conds(
            guider.inner_model,
            x,
            conds,
            x.device,
            inversion.latent(-1, x),
            denoise_mask,
            extra_args.get("seed"),
            latent_shapes=[x.shape],
        )["positive"]
        source = Source(guider.inner_model, network, inversion, entries, options, denoise_mask)
        if inversion.virtual and any(source.entry(step) is None for step in range(inversion.steps)):
            raise ValueError(
                "the inversion's source description leaves out a part of the sampling, which a "
                "virtual inversion cannot: take its time range away"
            )
        yield source, patchers
    finally:
        comfy.sampler_helpers.cleanup_models(conds, models)
