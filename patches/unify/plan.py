"""Plans UnifyEdit's steps and layers before the first step of a sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.layers import AttentionLayer
from ..attention.networks import Readable
from ..host.sigmas import progress
from .settings import UnifySettings


@dataclass(frozen=True)
class Step:
    """One step of the sampling.

    progress: 0 at pure noise, 1 at the clean image.
    structure, alignment: the weights of both losses, 0 where the latent is not optimised.
    """

    sigma: float
    progress: float
    structure: float
    alignment: float

    @property
    def weights(self) -> tuple[float, float]:
        return self.structure, self.alignment


def plan_steps(settings: UnifySettings, model_sampling: Any, sigmas: torch.Tensor) -> list[Step]:
    """The steps of a sampling through `sigmas`, [steps + 1].

    Raises ValueError if there is something to optimise but no step for it.
    """
    balance, options = settings.balance, settings.options
    first, last = (
        model_sampling.percent_to_sigma(percent) for percent in (options.start_percent, options.end_percent)
    )
    along = progress(model_sampling, sigmas[:-1]).tolist()
    plan = [
        Step(sigma, at, *(balance.weights(at) if last <= sigma <= first else (0.0, 0.0)))
        for sigma, at in zip(sigmas[:-1].tolist(), along, strict=True)
    ]
    if (balance.beta1 or balance.beta2) and not any(any(step.weights) for step in plan):
        raise ValueError(
            f"no step is optimised: start_percent {options.start_percent} to end_percent "
            f"{options.end_percent} holds none of the {len(plan)} steps, or the balance's curves are 0 "
            "there: widen them"
        )
    return plan


@dataclass(frozen=True, eq=False)
class Layers:
    """Layers that the losses read: self-attention for structure, cross-attention for words."""

    network: Readable
    structure: tuple[AttentionLayer, ...]
    words: tuple[AttentionLayer, ...]


def choose_layers(
    settings: UnifySettings, plan: Sequence[Step], network: Readable, kind: str, x: torch.Tensor
) -> Layers:
    """The layers read by the losses that have a weight, for a latent `x`.

    kind: as in `word_layers`.
    """
    options, (height, width) = settings.options, x.shape[-2:]
    structure, words = (), ()
    if any(step.structure for step in plan):
        structure = network.structure_layers(
            height, width, options.max_self_attn_res, options.structure_layers, kind
        )
    if any(step.alignment for step in plan) or options.auto_mask:
        words = network.word_layers(height, width, options.cross_attn_res, options.word_layers, kind)
    return Layers(network, structure, words)
