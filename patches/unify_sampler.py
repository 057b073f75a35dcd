"""UnifyEdit's sampler (arXiv 2504.05594): Euler steps whose latent is moved, before each, by two attention
losses.

Source branch: the stored inversion latents, run with the source description. Target branch: the latent that
is sampled, run with the guider's positive conditioning. At each step the target latent takes one gradient
step on structure (SAP) and alignment (CAA), then the guider predicts as usual and the latent goes one Euler
step down.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.utils import model_trange

from ..models.sites import Site, find_sites
from .attention_maps import AttentionRecorder
from .gradient import differentiable_options, gradients
from .inversion import Inversion
from .masks import check_mask, site_masks
from .progress import progress
from .tokens import EditTokens
from .unify_balance import Balance, row_norm
from .unify_losses import alignment_loss, structure_loss

NODE = "DescEditUnifySampler"


@dataclass(frozen=True, eq=False)
class UnifySettings:
    """What the sampler follows.

    mask: [rows or 1, height, width], 1 where the edit happens, or None for the whole image.
    structure_side: structure is kept at the self-attentions with at most this many tokens a side.
    word_side: words are aligned at the cross-attentions whose grid is closest to this many tokens a side.
    """

    inversion: Inversion
    tokens: EditTokens
    balance: Balance
    mask: torch.Tensor | None = None
    structure_side: int = 32
    word_side: int = 16


class UnifySampler(comfy.samplers.KSAMPLER):
    """SAMPLER that edits an inverted image.

    It starts from the inversion's noise and keeps the inverted image outside a noise mask. Of the latent it
    is given only the size, the number of images and the noise mask count. Raises ValueError before the first
    step if the inversion does not belong to the guider's model, the latent's size or the sigmas, or if the
    settings do not fit them.
    """

    def __init__(self, settings: UnifySettings) -> None:
        super().__init__(_sample_unify, {"settings": settings})
        self._inversion = settings.inversion

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        self._inversion.check(NODE, model_wrap.model_patcher, noise.shape, sigmas)
        clean = self._inversion.latent(-1, noise)
        # On the straight line from the inverted noise to the image, which is where Euler steps keep what a
        # noise mask protects.
        noise = (self._inversion.latent(0, noise) - clean) / sigmas[0]
        return super().sample(
            model_wrap, sigmas, extra_args, callback, noise, clean, denoise_mask, disable_pbar
        )


def _sample_unify(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    settings: UnifySettings,
) -> torch.Tensor:
    extra_args = extra_args or {}
    x = settings.inversion.latent(0, x)
    rows = x.new_ones([x.shape[0]])
    optimiser = _LatentOptimiser(model.inner_model, settings, x, sigmas, extra_args)
    try:
        for i in model_trange(len(sigmas) - 1, disable=disable):
            sigma = sigmas[i]
            x = x - optimiser.update(i, x, sigma * rows)
            denoised = model(x, sigma * rows, **extra_args)
            if callback is not None:
                callback({"i": i, "denoised": denoised, "x": x, "sigma": sigma, "sigma_hat": sigma})
            x = x + (x - denoised) / sigma * (sigmas[i + 1] - sigma)
    finally:
        optimiser.close()
    optimiser.report()
    return x


class _LatentOptimiser:
    """One sampling's source branch, sites and gradients."""

    def __init__(
        self,
        guider: Any,
        settings: UnifySettings,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
    ) -> None:
        self._guider, self._settings = guider, settings
        self._options = {
            name: value for name, value in extra_args["model_options"].items() if name != "multigpu_clones"
        }
        self._denoise_mask = extra_args.get("denoise_mask")
        height, width = x.shape[-2:]
        sites = find_sites(guider.inner_model.diffusion_model, NODE)
        use_structure, use_words = settings.balance.beta1 > 0, settings.balance.beta2 > 0
        self._self_sites = (
            structure_sites(sites, height, width, settings.structure_side) if use_structure else ()
        )
        self._cross_sites = word_sites(sites, height, width, settings.word_side) if use_words else ()
        scale = guider.inner_model.latent_format.spacial_downscale_ratio
        mask = settings.mask
        if mask is not None:
            check_mask(NODE, mask, x.shape[0], height * scale, width * scale)
        self._masks = site_masks(mask, self._cross_sites, height, width, x.device)
        self._sigmas = sigmas.tolist()
        self._progress = progress(guider.inner_model.model_sampling, sigmas[:-1]).tolist()
        self._target = guider.conds.get("positive") or []
        if not _whole_image(self._target):
            raise ValueError(
                f"{NODE}: the guider's positive conditioning has no entry for the whole image: "
                "wire the edit description without an area or a mask to it"
            )
        self._source, self._source_models = self._process_source(x, extra_args) if use_structure else ([], [])
        self._used = x.new_zeros(())

    def update(self, i: int, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What to take from the target latent before step `i`: the balanced gradient, scaled to the step's
        length.

        Its unit of length is the norm of the source branch's own step, |x_i - x_{i+1}| along the stored path,
        image by image.
        """
        entry = _active(self._target, self._sigmas[i])
        if entry is None or not (self._self_sites or self._cross_sites):
            return torch.zeros_like(x)
        inversion, balance = self._settings.inversion, self._settings.balance
        start = inversion.latent(i, x)
        structure, alignment = self._gradients(entry, start, x, sigma, self._sigmas[i])
        direction = balance.direction(structure, alignment, self._progress[i])
        self._used = self._used + (direction != 0).any()
        step = direction * row_norm(start - inversion.latent(i + 1, x))
        return step if self._denoise_mask is None else step * self._denoise_mask

    def _gradients(
        self,
        entry: dict[str, Any],
        source_x: torch.Tensor,
        x: torch.Tensor,
        sigma: torch.Tensor,
        level: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        source = None
        source_entry = _active(self._source, level)
        if self._self_sites and source_entry is not None:
            source = AttentionRecorder(self._self_sites, (), stop=True)
            self._run(source, source_entry, source_x, sigma, self._options)
        with gradients():
            leaf = x.clone().requires_grad_()
            target = AttentionRecorder(self._self_sites, self._cross_sites, stop=True)
            self._run(target, entry, leaf, sigma, differentiable_options(self._options))
            structure = alignment = torch.zeros_like(leaf, requires_grad=False)
            if source is not None:
                losses = structure_loss(source.self_attention, target.self_attention)
                structure = target.gradient(losses, leaf, keep=bool(self._cross_sites))
            if self._cross_sites:
                alignment = target.gradient(self._alignment(target), leaf)
        return structure, alignment

    def _alignment(self, target: AttentionRecorder) -> torch.Tensor:
        tokens = self._settings.tokens
        words = [word.tokens for word in tokens.words]
        last, context = max(map(max, words)), next(iter(target.cross_attention.values())).shape[-1]
        if last >= context:
            raise ValueError(
                f"{NODE}: edit_tokens has token {last} but the guider's positive conditioning has {context} "
                "tokens: encode the edit description that the tokens were found in"
            )
        return alignment_loss(target.cross_attention, words, tokens.edit_length, self._masks)

    def _run(
        self,
        recorder: AttentionRecorder,
        entry: dict[str, Any],
        x: torch.Tensor,
        sigma: torch.Tensor,
        options: dict,
    ) -> None:
        comfy.samplers.calc_cond_batch(
            self._guider.inner_model, [[entry]], x, sigma, recorder.attach(options)
        )
        if not recorder.complete:
            raise ValueError(
                f"{NODE}: another node keeps the UNet from running at every step (EasyCache, for one): "
                "take it out of the model's chain"
            )

    def _process_source(self, x: torch.Tensor, extra_args: dict[str, Any]) -> tuple[list, list]:
        """The source description's conditioning as the model takes it, and the extra models it loaded
        (ControlNets).
        """
        guider = self._guider
        conds = {"positive": comfy.sampler_helpers.convert_cond(self._settings.inversion.conditioning)}
        comfy.samplers.preprocess_conds_hooks(conds)
        comfy.samplers.filter_registered_hooks_on_conds(conds, self._options)
        models, memory = comfy.sampler_helpers.get_additional_models(
            conds, guider.model_patcher.model_dtype()
        )
        if models:
            in_use = [guider.model_patcher, *guider.loaded_models]
            comfy.model_management.load_models_gpu([*in_use, *models], memory_required=memory)
        conds = comfy.samplers.process_conds(
            guider.inner_model,
            x,
            conds,
            x.device,
            self._settings.inversion.latent(-1, x),
            self._denoise_mask,
            extra_args.get("seed"),
            latent_shapes=[x.shape],
        )
        return conds["positive"], models

    def close(self) -> None:
        """Let go of what the source conditioning loaded."""
        comfy.sampler_helpers.cleanup_models({"positive": self._source}, self._source_models)

    def report(self) -> None:
        """After the last step: warn of steps without a usable gradient; raise ValueError if there was none
        at all.
        """
        steps, used = len(self._progress), int(self._used)
        if used == steps or not (self._self_sites or self._cross_sites):
            return
        if used == 0:
            raise ValueError(
                f"{NODE}: no step had a usable gradient (all zero or not finite): "
                "check that the words are in the description that the guider's positive conditioning encodes"
            )
        logging.warning(
            "%s: %d of %d steps had no usable gradient and were not optimised", NODE, steps - used, steps
        )


def structure_sites(sites: Sequence[Site], height: int, width: int, side: int) -> tuple[Site, ...]:
    """The sites with at most `side` x `side` tokens, for a latent of `height` x `width`. Raises ValueError
    if none.
    """
    chosen = tuple(site for site in sites if math.prod(site.grid(height, width)) <= side * side)
    if not chosen:
        raise ValueError(
            f"{NODE}: structure_side is {side} but this model and image size have self-attention at "
            f"{_grids(sites, height, width)} only: raise it"
        )
    return chosen


def word_sites(sites: Sequence[Site], height: int, width: int, side: int) -> tuple[Site, ...]:
    """The sites of the resolution whose number of tokens is closest to `side` x `side`, by ratio."""

    def distance(site: Site) -> float:
        return abs(math.log(math.prod(site.grid(height, width)) / (side * side)))

    nearest = min(distance(site) for site in sites)
    return tuple(site for site in sites if distance(site) == nearest)


def _grids(sites: Sequence[Site], height: int, width: int) -> str:
    grids = sorted({site.grid(height, width) for site in sites}, reverse=True)
    return ", ".join(f"{columns}x{rows}" for rows, columns in grids)


def _whole_image(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if "area" not in entry and "mask" not in entry]


def _active(entries: Sequence[dict[str, Any]], sigma: float) -> dict[str, Any] | None:
    """The first entry for the whole image whose range of noise levels holds `sigma`."""
    for entry in _whole_image(entries):
        if entry.get("timestep_end", 0.0) <= sigma <= entry.get("timestep_start", math.inf):
            return entry
    return None
