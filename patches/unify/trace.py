"""What a run of UnifyEdit's sampler records of itself, and how it gets out.

A SAMPLER cannot add anything to the LATENT that SamplerCustomAdvanced puts out, but a NOISE can: it is given
the dictionary from which that LATENT is made. So the sampler comes with a NOISE of its own, which is empty
and leaves a box in the dictionary; the sampler fills the box when the run is over. A trace therefore belongs
to the LATENT that the run made, and nothing stays on the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...pictures.plots import Panel, draw_panels

KEY = "descriptive_edit_trace"
LOSSES = ("structure", "alignment")


@dataclass(frozen=True, eq=False)
class Trace:
    """One run, a record for every optimisation of the latent.

    steps: how many the sampling had. places: the step of each record, with inner iterations at equal
    distances up to the next step. values: [records, 4, images], both losses and then the norms of their
    gradients, in LOSSES' order; NaN for a loss that had no weight or was not finite. moved: [records,
    images], whether the gradients were usable.
    """

    steps: int
    places: tuple[float, ...]
    values: torch.Tensor
    moved: torch.Tensor

    def describe(self) -> str:
        """How many optimisations were made and how many skipped, a line an image."""
        lines = []
        for image, moved in enumerate(self.moved.sum(dim=0).tolist()):
            skipped = len(self.places) - moved
            lines.append(
                f"image {image + 1}: {self.steps} steps, {moved} gradient steps, {skipped} skipped for want "
                "of a usable gradient"
            )
        return "\n".join(lines)

    def draw(self) -> torch.Tensor:
        """Losses and gradient norms by step, as in the paper's Fig. 5, each curve relative to its own
        largest value, which is in its name. Crosses are skipped optimisations. IMAGE, one for each image.
        """
        pictures = []
        for image in range(self.values.shape[2]):
            curves = self.values[:, :, image].T.tolist()
            crosses = [
                place
                for place, moved in zip(self.places, self.moved[:, image].tolist(), strict=True)
                if not moved
            ]
            panels = [
                Panel(title, self.places, dict(zip(LOSSES, part, strict=True)), crosses)
                for title, part in (("losses", curves[:2]), ("gradient norms", curves[2:]))
            ]
            pictures.append(draw_panels(panels, self.steps))
        return torch.cat(pictures)


class TraceBox:
    """What lies in the LATENT: empty until the run is over."""

    trace: Trace | None = None


class TraceNoise:
    """NOISE: zeros, which leaves a box for the trace in the LATENT and hands it to the sampler.

    expect: told of the box before the run.
    """

    seed = 0

    def __init__(self, expect: Callable[[TraceBox], None]) -> None:
        self._expect = expect

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """Zeros of the latent's shape, on the CPU like the host's own noise."""
        box = TraceBox()
        input_latent[KEY] = box
        self._expect(box)
        return torch.zeros(input_latent["samples"].shape, device="cpu")


def read_trace(latent: dict[str, Any]) -> Trace:
    """The trace of the run that made `latent`. Raises ValueError, if it has none."""
    trace = getattr(latent.get(KEY), "trace", None)
    if trace is None:
        raise ValueError(
            "latent has no trace: wire the noise output of UnifyEdit Sampler to the noise input of "
            "SamplerCustomAdvanced, and that node's output here (a balance of 0 leaves no trace)"
        )
    return trace
