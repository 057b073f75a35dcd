"""Measures how far guidance by the text moves the latent: UnifyEdit's unit of length for its words."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_patcher
import torch

from .balance import row_norm

# Of the source's own step, where there is no guidance term to measure. With the Tiny Studio at CFG 2 the term
# is 0.11 to 0.33 of it over most of the sampling.
SHARE = 0.2
_POST = "sampler_post_cfg_function"


class TextGuidance:
    """The term of classifier-free guidance in the last prediction of a run.

    It is cfg (D_edit - D_negative), denoised. There is none before the first prediction, at a CFG of 1, and
    with a guider that does not use the host's CFG function.
    """

    def __init__(self) -> None:
        self._term: torch.Tensor | None = None

    def attach(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of `model_options` whose predictions are noted here, before other nodes change them."""
        options = comfy.model_patcher.create_model_options_clone(model_options)
        options[_POST] = [self._note, *options.get(_POST, ())]
        return options

    def _note(self, args: dict[str, Any]) -> torch.Tensor:
        guided = not math.isclose(args["cond_scale"], 1.0) or args["uncond"] is not None
        self._term = row_norm(args["denoised"] - args["uncond_denoised"]) if guided else None
        return args["denoised"]

    def length(self, sigma: torch.Tensor, below: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """What the term moves the latent by in a step from `sigma` to `below`, for each row.

        step: the length of the source's own step, of each row.
        """
        if self._term is None:
            return SHARE * step
        return self._term * ((sigma - below) / sigma)
