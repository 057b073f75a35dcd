"""The record of a run of UnifyEdit's sampler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...pictures.plots import Panel, draw_panels
from ..attention.checks import check_apart, check_order
from .plan import Step

LOSSES = ("structure", "alignment")


@dataclass(frozen=True, eq=False)
class Record:
    """One gradient step.

    at: the step of the sampling; inner steps are equally spaced up to the next one.
    values: [4, images], both losses and then the norms of their gradients, in LOSSES' order; NaN for a loss
    that had no weight or was not finite.
    usable: [images], whether the latent was moved.
    reordered: layers whose tokens another node replaced, for `check_order`.
    mixed: whether rows were mixed, for `check_apart`.
    """

    at: float
    values: torch.Tensor
    usable: torch.Tensor
    reordered: list[tuple[str, torch.Tensor]]
    mixed: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Trace:
    """One run, with a record for each gradient step.

    steps: number of steps of the sampling.
    at, values, usable: of each record; [records], [records, 4, images] and [records, images].
    mask: [rows or 1, height, width], the given or found edit region; None for the whole image.
    """

    steps: int
    at: tuple[float, ...]
    values: torch.Tensor
    usable: torch.Tensor
    mask: torch.Tensor | None

    def draw(self) -> torch.Tensor:
        """Plots losses and gradient norms by step, as in the paper's Fig. 5. Returns an IMAGE, one for each
        image.

        Each curve is relative to its own largest value, which its label gives. Crosses are skipped gradient
        steps.
        """
        pictures = []
        for curves, moves in zip(self.values.permute(2, 1, 0).tolist(), self.usable.T.tolist(), strict=True):
            crosses = [at for at, usable in zip(self.at, moves, strict=True) if not usable]
            panels = [
                Panel(title, self.at, dict(zip(LOSSES, part, strict=True)), crosses)
                for title, part in (("losses", curves[:2]), ("gradient norms", curves[2:]))
            ]
            pictures.append(draw_panels(panels, self.steps))
        return torch.cat(pictures)


def make_trace(
    plan: Sequence[Step], records: Sequence[Record], images: int, mask: torch.Tensor | None
) -> Trace:
    """The Trace of a run. Warns of gradient steps that were not usable.

    Raises ValueError if the latent should have been optimised and an image was not, or if another node had
    reordered tokens or mixed rows.
    """
    mask = None if mask is None else mask.cpu()
    if not records:
        if any(any(step.weights) for step in plan):
            raise ValueError(
                "no step was optimised: the guider's positive conditioning has no entry for the whole image "
                "in the steps to optimise: widen its time range, or start_percent to end_percent"
            )
        return Trace(len(plan), (), torch.empty(0, 4, images), torch.empty(0, images, dtype=torch.bool), mask)
    check_order([moved for record in records for moved in record.reordered])
    check_apart([mixed for record in records for mixed in record.mixed])
    values = torch.stack([record.values for record in records]).cpu()
    usable = torch.stack([record.usable for record in records]).cpu()
    least, image = (int(value) for value in usable.sum(dim=0).min(dim=0))
    if least == 0:
        raise ValueError(
            f"no step had a usable gradient for image {image + 1} (all zero or not finite): check "
            "that the words are in the description that the guider's positive conditioning encodes"
        )
    if least < len(records):
        logging.warning(
            "UnifyEdit: %d of %d gradient steps had no usable gradient and were left out",
            len(records) - least,
            len(records),
        )
    return Trace(len(plan), tuple(record.at for record in records), values, usable, mask)
