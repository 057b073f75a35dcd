"""Editing methods of other papers for flow models, each as small as its idea: FlowEdit and RF-Edit.

A flow's latent at the noise level s, 0 to 1, is (1 - s) image + s noise, and the network predicts the
velocity noise - image.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import comfy.samplers
import torch

from .paper_methods import Beside
from .studio import Batch, Studio, StudioMethod, cfg_guider, sample, schedule

LOWEST = 1e-3  # the noise level at which the velocity of a clean image is asked for


def flow_edit(source_cfg: float, cfg: float, skipped: int) -> StudioMethod:
    """The difference of two velocities, without an inversion (FlowEdit, arXiv 2412.08629).

    At each step the source gets new noise, and the target the same difference to its estimate. The estimate
    follows the target's velocity minus the source's, so equal descriptions and scales give the image back.

    source_cfg, cfg: guidance of source and target; the paper takes 1.5 and 5.5 for Flux.
    skipped: of the 25 steps, how many are left out at the noisy end.
    """

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        beside, size = Beside(tiny, batch), len(batch)
        sigmas, generator = schedule(tiny)[skipped:], torch.Generator().manual_seed(0)
        clean = tiny.model.model.process_latent_in(batch.latent)

        def step(model: Any, x: torch.Tensor, number: int, extra_args: dict[str, Any]) -> torch.Tensor:
            guider, (sigma, below) = model.inner_model, sigmas[number : number + 2].to(x)
            source = clean.to(x)
            target = source if number == 0 else x[size:]
            noise = torch.randn(source.shape, generator=generator).to(x)
            noised = (1 - sigma) * source + sigma * noise
            both = torch.cat([noised, target + noised - source])
            conds = [guider.conds["positive"], guider.conds["negative"]]
            text, none = comfy.samplers.calc_cond_batch(
                guider.inner_model, conds, both, sigma.expand(len(both)), extra_args["model_options"]
            )
            scales = torch.tensor([source_cfg, cfg]).repeat_interleave(size).to(x)[:, None, None, None]
            velocity = (both - none - scales * (text - none)) / sigma
            return torch.cat([source, target + (below - sigma) * (velocity[size:] - velocity[:size])])

        return beside.sample(batch.latent, sigmas, 1.0, step)

    return StudioMethod("FlowEdit", edit, f"flowedit {source_cfg:g} {cfg:g} {skipped}")


def rf_edit(cfg: float, blocks: int, share: float) -> StudioMethod:
    """A second-order inversion whose values the target reads (RF-Edit of RF-Solver, arXiv 2411.04746).

    Both ways take midpoint steps, which is the paper's second-order formula with its derivative from half a
    step. In the first part `share` (0 to 1) of the edit's steps the values of the source's image replace
    those of the target's in the last `blocks` single blocks; the paper shares them in 5 of 15 to 30 steps.
    """

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        beside, sigmas = Beside(tiny, batch), schedule(tiny)
        first = len(tiny.model.model.diffusion_model.single_blocks) - blocks

        def shared(q: Any, k: Any, v: Any, pe: Any, attn_mask: Any, extra_options: Any) -> dict[str, Any]:
            single = extra_options["block_type"] == "single" and extra_options["block_index"] >= first
            if not single or beside.progress >= share:
                return {}
            v, image = v.clone(), slice(*extra_options["img_slice"])
            for source, target in beside.rows(extra_options, unconditional=True):
                v[target][:, :, image] = v[source][:, :, image]
            return {"v": v}

        beside.model.set_model_attn1_patch(shared)
        starts, middles = _inverted(tiny, batch, sigmas)
        size = len(batch)

        def step(model: Any, x: torch.Tensor, number: int, extra_args: dict[str, Any]) -> torch.Tensor:
            sigma, below = sigmas[number : number + 2].to(x)
            target = starts[number] if number == 0 else x[size:]
            middle = (sigma + below) / 2
            slope = _velocity(model, torch.cat([starts[number], target]), sigma, extra_args)[size:]
            half = torch.cat([middles[number], target + (middle - sigma) * slope])
            slope = _velocity(model, half, middle, extra_args)[size:]
            return torch.cat([starts[number], target + (below - sigma) * slope])

        return beside.sample(batch.latent, sigmas, cfg, step)

    return StudioMethod("RF-Edit", edit, f"rf-edit {cfg:g} {blocks} {share:g}")


def _inverted(
    tiny: Studio, batch: Batch, sigmas: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The source's latents at the start and in the middle of each step from noise to image."""
    starts: list[torch.Tensor] = []
    middles: list[torch.Tensor] = []

    def run(model: Any, x: torch.Tensor, levels: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
        for sigma, above in pairwise(levels):
            middle = (sigma + above) / 2
            half = x + (middle - sigma) * _velocity(model, x, sigma.clamp(min=LOWEST), extra_args)
            x = x + (above - sigma) * _velocity(model, half, middle, extra_args)
            starts.insert(0, x)
            middles.insert(0, half)
        return x

    guider = cfg_guider(tiny.model, batch.source_text, batch.no_text, 1.0)
    sample(guider, torch.zeros_like(batch.latent), batch.latent, sigmas.flip(0), comfy.samplers.KSAMPLER(run))
    return starts, middles


def _velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, extra_args: dict[str, Any]) -> torch.Tensor:
    return (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
