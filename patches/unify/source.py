"""UnifyEdit's source branch: the inverted image's latents, run with the source description."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention.layers import AttentionLayer
from ..attention.networks import Readable
from ..attention.projections import Projections
from ..attention.recorder import AttentionRecorder, active_entry, record
from ..inversion import Inversion


@dataclass(frozen=True, eq=False)
class Source:
    """The source branch of one sampling.

    virtual: whether the inversion is.
    path: the inversion's trajectory, on the sampling's device, so that no step waits for a copy.
    sigmas: of the inversion.
    entries: the source description as the model takes it.
    options: the model options of every call.
    denoise_mask: the sampling's noise mask, or None.
    """

    model: BaseModel
    network: Readable
    virtual: bool
    path: torch.Tensor
    sigmas: Sequence[float]
    entries: list[dict[str, Any]]
    options: dict[str, Any]
    denoise_mask: torch.Tensor | None = None

    def entry(self, step: int) -> dict[str, Any] | None:
        """The description's entry for the whole image that is active at `step`."""
        return active_entry(self.entries, self.sigmas[step])

    def latent(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """The path's latent at `step`, one row for each of `x`."""
        return self.path[step].expand_as(x)

    def open(self, step: int, x: torch.Tensor, layers: Sequence[AttentionLayer]) -> Reading:
        """What the source has to give at `step`, before it is read.

        x: the target latent, [rows, ...].
        layers: whose self-attention is needed.
        """
        entry = self.entry(step)
        return Reading(entry, self.latent(step, x), layers if entry is not None else ())

    def read(self, reading: Reading, sigma: torch.Tensor) -> None:
        """Run the source by itself.

        sigma: [rows].

        Stored inversion: nothing is added to the target's prediction, and without layers there is no model
        call. Virtual inversion: the source's own prediction should be the clean image x_0; its error is
        subtracted from the target's, D* + (x_0 - D_s). This is InfEdit's x_0 + (x*_t - x^s_t) - sigma (eps* -
        eps_s) (arXiv 2312.04965) in denoised space. If the target is predicted like the source, the result is
        x_0, exactly.
        """
        if reading.entry is None or not (reading.layers or self.virtual):
            return
        recorder = AttentionRecorder(self.network, reading.layers, (), stop=not self.virtual)
        denoised = record(self.model, recorder, reading.entry, reading.latent, sigma, self.options)
        reading.attention = recorder.self_attention
        if self.virtual:
            error = self.latent(-1, reading.latent) - denoised
            reading.offset = error if self.denoise_mask is None else error * self.denoise_mask


@dataclass(eq=False)
class Reading:
    """The source branch at one step.

    entry: the description's entry, None if none is active.
    latent: the inversion's, [rows, ...].
    layers: whose self-attention is needed.
    attention: at these layers; empty until the source is read.
    offset: what to add to the denoised prediction of the target.
    """

    entry: dict[str, Any] | None
    latent: torch.Tensor
    layers: Sequence[AttentionLayer]
    attention: Mapping[str, Projections] = field(default_factory=dict)
    offset: torch.Tensor | float = 0.0

    @property
    def unread(self) -> bool:
        """Whether attention is needed and not there yet."""
        return bool(self.layers) and not self.attention


@contextmanager
def open_source(
    guider: comfy.samplers.CFGGuider,
    network: Readable,
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
        source = Source(
            guider.inner_model,
            network,
            inversion.virtual,
            inversion.trajectory.to(x.device),
            inversion.sigmas.tolist(),
            entries,
            options,
            denoise_mask,
        )
        if inversion.virtual and any(source.entry(step) is None for step in range(inversion.steps)):
            raise ValueError(
                "the inversion's source description leaves out a part of the sampling, which a "
                "virtual inversion cannot: take its time range away"
            )
        yield source, patchers
    finally:
        comfy.sampler_helpers.cleanup_models(conds, models)
