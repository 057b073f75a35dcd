"""UnifyEdit's source branch: the inverted image's latents, run with the source description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ..attention.layers import AttentionLayer
from ..attention.networks import Network
from ..attention.recorder import AttentionRecorder, active_entry, record
from ..inversion import Inversion


class SourceBranch:
    """The source branch of one sampling.

    guider: the host's, in a run.
    network: its model's.
    inversion: of the source image.
    x: the latent that is sampled, [rows, ...].
    options: the model options of every call.
    memory: bytes that the run needs beside what the host has made room for.

    Raises ValueError if the inversion is virtual and its description is silent at a step.
    """

    def __init__(
        self,
        guider: Any,
        network: Network,
        inversion: Inversion,
        x: torch.Tensor,
        options: dict[str, Any],
        extra_args: dict[str, Any],
        memory: float,
    ) -> None:
        self._guider, self._network = guider, network
        self._inversion, self._options = inversion, options
        self._keep = extra_args.get("denoise_mask")
        self._levels = inversion.sigmas.tolist()
        self.entries, self._models = self._process(x, extra_args, memory)
        if inversion.virtual and any(self.entry(step) is None for step in range(inversion.steps)):
            raise ValueError(
                "the inversion's source description leaves out a part of the sampling, which a "
                "virtual inversion cannot: take its time range away"
            )

    def entry(self, step: int) -> dict[str, Any] | None:
        """The description's entry for the whole image that is active at `step`."""
        return active_entry(self.entries, self._levels[step])

    def read(
        self, step: int, x: torch.Tensor, sigma: torch.Tensor, layers: Sequence[AttentionLayer]
    ) -> tuple[AttentionRecorder | None, torch.Tensor | float]:
        """The self-attention at `layers`, and what to add to the denoised prediction of the target.

        Stored inversion: nothing to add, and no call at all if there are no layers. Virtual inversion: the
        source's own prediction should be the clean image x_0; how far it is from that is taken off the
        target's, D* + (x_0 - D_s), which is InfEdit's x_0 + (x*_t - x^s_t) - sigma (eps* - eps_s) (arXiv
        2312.04965) in denoised space. A target that is predicted as the source comes out as x_0, exactly.
        """
        entry, virtual = self.entry(step), self._inversion.virtual
        if entry is None or not (layers or virtual):
            return None, 0.0
        recorder = AttentionRecorder(self._network, layers, (), stop=not virtual)
        (denoised,) = record(
            self._guider.inner_model,
            recorder,
            entry,
            self._inversion.latent(step, x),
            sigma,
            self._options,
        )
        if not virtual:
            return recorder, 0.0
        error = self._inversion.latent(-1, x) - denoised
        return recorder, error if self._keep is None else error * self._keep

    def patchers(self) -> list[Any]:
        """The ModelPatchers that a model call runs."""
        return [self._guider.model_patcher, *self._guider.loaded_models, *self._models]

    def _process(
        self, x: torch.Tensor, extra_args: dict[str, Any], memory: float
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """The description as the model takes it, and the extra models it loaded (ControlNets)."""
        guider = self._guider
        conds = {"positive": comfy.sampler_helpers.convert_cond(self._inversion.conditioning)}
        comfy.samplers.preprocess_conds_hooks(conds)
        comfy.samplers.filter_registered_hooks_on_conds(conds, self._options)
        models, own = comfy.sampler_helpers.get_additional_models(conds, guider.model_patcher.model_dtype())
        # As the host does before a sampling, which knew neither of the gradients nor of these models.
        rows, *size = x.shape
        most, least = (guider.inner_model.memory_required([count * rows, *size]) for count in (2, 1))
        comfy.model_management.load_models_gpu(
            [guider.model_patcher, *guider.loaded_models, *models],
            memory_required=most + own + memory,
            minimum_memory_required=least + own + memory,
        )
        conds = comfy.samplers.process_conds(
            guider.inner_model,
            x,
            conds,
            x.device,
            self._inversion.latent(-1, x),
            self._keep,
            extra_args.get("seed"),
            latent_shapes=[x.shape],
        )
        return conds["positive"], models

    def close(self) -> None:
        """Let go of what the source description loaded."""
        comfy.sampler_helpers.cleanup_models({"positive": self.entries}, self._models)
