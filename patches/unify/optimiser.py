"""UnifyEdit's optimisation of the latent during one sampling: both branches, their losses and gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import torch
from einops import rearrange

from ..attention.checks import check_order
from ..attention.layers import AttentionLayer, structure_layers, word_layers
from ..attention.masks import check_mask, layer_masks
from ..attention.networks import network_of
from ..attention.recorder import (
    AttentionRecorder,
    LossGradient,
    Projections,
    active_entry,
    record,
    whole_image,
)
from ..host.autograd import differentiable_options, gradients, naming_writes, weights_streamed
from ..host.checkpointing import checkpointed
from ..host.inputs import check_noise_mask
from ..host.progress import progress
from .balance import row_norm
from .losses import alignment_loss, structure_loss
from .mask import attention_mask, word_attention
from .memory import backward_bytes, copied_bytes
from .settings import UnifySettings
from .source import SourceBranch
from .trace import LOSSES, Trace
from .words import Words, edit_words, source_words

# Where the path is read for an automatic mask: the picture is there, and still moves with the words.
MASK_PROGRESS = (0.5, 0.7, 0.9)
_LATENT = AttentionLayer("latent", level=0, width=0, heads=0, path="")


class LatentOptimiser:
    """One sampling's optimisation.

    guider: the host's, in a run. x: the latent that is sampled, [rows, channels, height, width]. sigmas:
    [steps + 1]. Raises ValueError for settings that do not fit these.
    """

    def __init__(
        self,
        guider: Any,
        settings: UnifySettings,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
    ) -> None:
        self._guider, self._settings, self._model = guider, settings, guider.inner_model
        self._options = {
            name: value for name, value in extra_args["model_options"].items() if name != "multigpu_clones"
        }
        self._levels = sigmas.tolist()
        self._progress = progress(self._model.model_sampling, sigmas[:-1]).tolist()
        self._plan = self._weights_by_step()
        self._choose_layers(x)
        self._tokens = settings.rows(len(x))
        self._words: dict[tuple[Any, int], Words] = {}
        self._target = guider.conds.get("positive") or []
        if not whole_image(self._target):
            raise ValueError(
                "the guider's positive conditioning has no entry for the whole image: "
                "wire the edit description without an area or a mask to it"
            )
        memory, self._checkpoint = self._plan_memory(x)
        self._source = SourceBranch(
            guider, self._network, settings.inversion, x, self._options, extra_args, memory
        )
        self._maps: dict[str, Projections] | None = None
        self._reordered: list[tuple[str, torch.Tensor]] = []
        self._places: list[float] = []
        self._values: list[torch.Tensor] = []
        self._moved: list[torch.Tensor] = []

    def _weights_by_step(self) -> list[tuple[float, float]]:
        """Both losses' weights at each step, 0 outside the range of steps that are optimised."""
        settings, sampling = self._settings, self._model.model_sampling
        first, last = sampling.percent_to_sigma(settings.start), sampling.percent_to_sigma(settings.end)
        balance = settings.balance
        plan = [
            balance.weights(at) if last <= level <= first else (0.0, 0.0)
            for at, level in zip(self._progress, self._levels[:-1], strict=True)
        ]
        if (balance.beta1 or balance.beta2) and not any(map(any, plan)):
            raise ValueError(
                f"no step is optimised: start_percent {settings.start} to end_percent {settings.end} "
                f"holds none of the {len(plan)} steps, or the balance's curves are 0 there: widen them"
            )
        return plan

    def _plan_memory(self, x: torch.Tensor) -> tuple[float, bool]:
        """Bytes that a gradient takes, and whether layers are computed again for it: where the settings say
        so, and where weights are streamed and their copies do not fit otherwise.
        """
        patcher, network = self._guider.model_patcher, self._network
        layers, itemsize = (self._self_layers, self._cross_layers), self._model.get_dtype_inference().itemsize
        streamed, checkpoint = weights_streamed([patcher]), self._settings.checkpoint

        def needed(checkpoint: bool) -> float:
            copies = copied_bytes(network, [*layers[0], *layers[1]], itemsize, checkpoint) if streamed else 0
            return backward_bytes(network, *layers, x.shape, itemsize, checkpoint) + copies

        if streamed and not checkpoint:
            free = comfy.model_management.get_free_memory(x.device)
            if patcher.is_dynamic():  # its weights make room by themselves
                free += patcher.loaded_size()
            checkpoint = self._model.memory_required(list(x.shape)) + needed(False) > free
            if checkpoint:
                logging.info("UnifyEdit: memory is short: layers are computed again for their gradient")
        return needed(checkpoint), checkpoint

    def _choose_layers(self, x: torch.Tensor) -> None:
        settings, (height, width) = self._settings, x.shape[-2:]
        self._network = network_of(self._model.diffusion_model)
        layers = self._network.layers.values()
        structure, words = (any(weights) for weights in zip(*self._plan, strict=True))
        self._self_layers = self._cross_layers = ()
        if structure:
            self._self_layers = structure_layers(
                layers, height, width, settings.structure_side, settings.structure_sites
            )
        if words or settings.auto_mask:
            self._cross_layers = word_layers(layers, height, width, settings.word_side, settings.word_sites)

    def lay_masks(self, x: torch.Tensor, denoise_mask: torch.Tensor | None) -> None:
        """Before the first step: the edit mask on every grid that needs it, and where the latent may move."""
        settings, (height, width) = self._settings, x.shape[-2:]
        mask = settings.mask
        if denoise_mask is not None:
            check_noise_mask(denoise_mask)
        if mask is not None:
            scale = self._model.latent_format.spacial_downscale_ratio
            check_mask(mask, len(x), height * scale, width * scale)
        elif settings.auto_mask:
            mask = self._find_mask(x)
            settings.check_cover(mask, "the automatic mask")
        self._masks = layer_masks(mask, self._cross_layers, height, width, x.device)
        self._regions = None
        if settings.keep != "everywhere":
            regions = layer_masks(mask, self._self_layers, height, width, x.device)
            inside = settings.keep == "inside"
            self._regions = {key: region if inside else 1 - region for key, region in regions.items()}
        self._reach: torch.Tensor | float = 1.0 if denoise_mask is None else denoise_mask
        if settings.mask_update:
            whole = layer_masks(mask, (_LATENT,), height, width, x.device)[_LATENT.key]
            self._reach = self._reach * rearrange(whole, "b (h w) -> b 1 h w", h=height)

    def _find_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Where the edit's words look in the inverted image, and where their partners of the source
        description do; [rows, height, width] of 0 and 1 on the latent's grid.
        """
        inversion, (height, width) = self._settings.inversion, x.shape[-2:]
        found: list[torch.Tensor] = []
        for wanted in MASK_PROGRESS:
            step = min(range(len(self._progress)), key=lambda i: abs(self._progress[i] - wanted))
            sigma = x.new_full((len(x),), self._levels[step])
            for entry, find in (
                (active_entry(self._target, self._levels[step]), edit_words),
                (self._source.entry(step), source_words),
            ):
                if entry is None:
                    continue
                recorder = AttentionRecorder(self._network, (), self._cross_layers, stop=True)
                latent = inversion.latent(step, x)
                record(self._model, recorder, entry, latent, sigma, self._options)
                words = self._words_of(recorder, find)
                found.append(
                    word_attention(recorder.cross_attention, words, self._cross_layers, height, width)
                )
        return attention_mask(found)

    def read_source(self, i: int, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | float:
        """Read the source branch for step `i`; returns what to add to the denoised prediction."""
        layers = self._self_layers if self._plan[i][0] else ()
        recorder, offset = self._source.read(i, x, sigma, layers)
        self._maps = recorder.self_attention if recorder is not None and layers else None
        return offset

    def update(self, i: int, x: torch.Tensor, sigma: torch.Tensor, iteration: int = 0) -> torch.Tensor:
        """What to take from the target latent at step `i`: the balanced gradient, scaled to the step's
        length.

        Its unit of length is the norm of the source branch's own step, |x_i - x_{i+1}| along its path, image
        by image. `read_source` comes first.
        """
        entry = active_entry(self._target, self._levels[i])
        words = self._plan[i][1] > 0
        if entry is None or not (words or self._maps is not None):
            return torch.zeros_like(x)
        structure, alignment = self._gradients(entry, x, sigma, words)
        direction = self._settings.balance.direction(structure, alignment, self._progress[i])
        self._places.append(i + iteration / self._settings.inner_iterations)
        self._moved.append((direction != 0).flatten(1).any(dim=1))
        inversion = self._settings.inversion
        return direction * row_norm(inversion.latent(i, x) - inversion.latent(i + 1, x)) * self._reach

    def _gradients(
        self, entry: dict[str, Any], x: torch.Tensor, sigma: torch.Tensor, words: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of structure and alignment, zero for one that has no weight."""
        with naming_writes(), gradients(weights_streamed(self._source.patchers())):
            leaf = x.clone().requires_grad_()
            options = differentiable_options(self._options)
            checkpoint = self._checkpoint
            if checkpoint:
                options["transformer_options"] = checkpointed(options["transformer_options"])
            target = AttentionRecorder(
                self._network,
                self._self_layers if self._maps is not None else (),
                self._cross_layers if words else (),
                stop=True,
                whole_layers=checkpoint,
            )
            try:
                own_grid = self._regions is not None
                record(self._model, target, entry, leaf, sigma, options, own_grid=own_grid)
                self._reordered += target.moved
                losses: dict[str, Callable[[], LossGradient]] = {}
                if self._maps is not None:
                    losses["structure"] = partial(
                        structure_loss, self._maps, target.self_attention, self._regions
                    )
                if words:
                    losses["alignment"] = partial(
                        alignment_loss,
                        target.cross_attention,
                        self._words_of(target, edit_words),
                        self._masks,
                        self._settings.alignment,
                    )
                values, found = {}, {}
                for number, (name, take) in enumerate(losses.items(), start=1):
                    loss = take()
                    values[name] = loss.values
                    found[name] = loss.by_latent(leaf, keep_graph=number < len(losses))
            finally:
                target.clear()
        nothing = x.new_full((len(x),), torch.nan)
        norms = {name: row_norm(gradient).flatten() for name, gradient in found.items()}
        self._values.append(
            torch.stack([part.get(name, nothing).detach() for part in (values, norms) for name in LOSSES])
        )
        return tuple(found.get(name, torch.zeros_like(x)) for name in LOSSES)

    def _words_of(self, recorder: AttentionRecorder, find: Any) -> Words:
        some = next(iter(recorder.cross_attention.values())).k
        key = (find, some.shape[1])
        if key not in self._words:
            self._words[key] = find(self._tokens, some.shape[1]).to(some.device)
        return self._words[key]

    def close(self) -> None:
        """Let go of what the source description loaded."""
        self._source.close()

    def finish(self) -> Trace | None:
        """After the last step: what was recorded, or None if nothing was to be optimised. Warns of steps
        without a usable gradient; raises ValueError if an image had no other, or if another node had put
        tokens into another order.
        """
        if not any(map(any, self._plan)):
            return None
        if not self._places:
            raise ValueError(
                "no step was optimised: the guider's positive conditioning has no entry for the "
                "whole image in the steps to optimise: widen its time range, or start_percent to end_percent"
            )
        check_order(self._reordered)
        trace = Trace(
            len(self._progress),
            tuple(self._places),
            torch.stack(self._values).cpu(),
            torch.stack(self._moved).cpu(),
        )
        least = int(trace.moved.sum(dim=0).min())
        if least == 0:
            image = int(trace.moved.sum(dim=0).argmin()) + 1
            raise ValueError(
                f"no step had a usable gradient for image {image} (all zero or not finite): check "
                "that the words are in the description that the guider's positive conditioning encodes"
            )
        if least < len(self._places):
            logging.warning(
                "UnifyEdit: %d of %d gradient steps had no usable gradient and were left out",
                len(self._places) - least,
                len(self._places),
            )
        return trace
