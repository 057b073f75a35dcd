"""Dual guidance (DescriptiveEdit, arXiv 2508.20505): one scale for keeping the image, one for the text.

With I the reference, T the edit description and 0 for neither, and every prediction in denoised space, where
the sums are the same as for the noise:

    paper    e(0,0) + image (e(I,0) - e(0,0)) + text (e(I,T) - e(I,0))
    release  e(I,0) + text (e(I,T) - e(I,0)) + image (e(I,T) - e(0,T))

Both are classifier-free guidance on the text pair e(I,T), e(I,0) with the scale `text`, plus an image term.
Other packs' functions are called in the host's order: pre-CFG functions on the text pair, a CFG function in
place of the pair's own sum, post-CFG functions on the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider

from ..host.sigmas import progress
from .apply import has_bridge
from .core import Door
from .guidance_rows import EDIT, UNCONDITIONAL, Row, predict_rows

KEY = "descriptive_edit.guidance"
FORMULAS = ("paper", "release")
_TABLE = 1000
# Model options of other nodes that need both descriptions' predictions.
_PAIRED = (
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_calc_cond_batch_function",
    "disable_cfg1_optimization",
)
Scale = float | torch.Tensor


@dataclass(frozen=True, eq=False)
class GuidanceSchedule:
    """The two scales over a sampling.

    Each is a table of values at progress 0, 1/1000 ... 1 (pure noise to clean image), linear in between.
    """

    image: np.ndarray
    text: np.ndarray

    def at(self, along: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both scales at progress `along` (a scalar tensor), on its device and without a sync."""
        index = along * _TABLE
        low = index.floor().clamp(max=_TABLE - 1)
        found = []
        for table in (self.image, self.text):
            values = torch.as_tensor(table, dtype=torch.float32, device=along.device)
            pair = values[low.long()], values[low.long() + 1]
            found.append(torch.lerp(*pair, index - low))
        return found[0], found[1]


def scale_table(start: float, end: float, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A scale from `start` where `curve` is 0 to `end` where it is 1."""
    return start + (end - start) * curve(np.linspace(0.0, 1.0, _TABLE + 1))


@dataclass(frozen=True, eq=False)
class DualGuidance:
    """The settings of dual guidance.

    image, text: the two scales, any finite numbers.
    formula: `paper` or `release`.
    schedule: replaces both scales.

    Raises ValueError for a scale that is not finite and for an unknown formula.
    """

    image: float = 1.5
    text: float = 7.5
    formula: str = "paper"
    schedule: GuidanceSchedule | None = None

    def __post_init__(self) -> None:
        if self.formula not in FORMULAS:
            raise ValueError(f"formula is {self.formula!r} but must be one of {', '.join(FORMULAS)}")
        for name in ("image", "text"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}_guidance is {getattr(self, name)} but must be a finite number")

    def image_term(self, image: Scale) -> dict[Row, Scale]:
        """Each prediction's weight in the term that is added to text guidance; they sum to 0."""
        if self.formula == "paper":
            return {UNCONDITIONAL: image - 1, Row(False, False): 1 - image}
        return {EDIT: image, Row(False, True): -image}

    def weights(self, image: Scale, text: Scale) -> dict[Row, Scale]:
        """Each prediction's weight in the result; they sum to 1."""
        found: dict[Row, Scale] = {EDIT: text, UNCONDITIONAL: 1 - text}
        for row, weight in self.image_term(image).items():
            found[row] = found.get(row, 0.0) + weight
        return found

    def rows(self, bridged: bool) -> list[Row]:
        """The rows with a weight that is not zero throughout the sampling, the text pair first.

        bridged: whether the model has a bridge.
        """
        scales: Any = self if self.schedule is None else self.schedule
        weights = _merged(self.weights(scales.image, scales.text), bridged)
        return [row for row, each in weights.items() if np.abs(each).max() > 1e-9]


def _merged(weights: dict[Row, Scale], bridged: bool) -> dict[Row, Scale]:
    """Without a bridge a row is the same with and without image: their weights add up."""
    if bridged:
        return weights
    merged: dict[Row, Scale] = {}
    for row, weight in weights.items():
        merged[Row(True, row.text)] = merged.get(Row(True, row.text), 0.0) + weight
    return merged


class DualGuider(CFGGuider):
    """GUIDER with dual guidance; `set_conds(edit, unconditional)`.

    door: context that is entered in every step.
    """

    def __init__(self, model: ModelPatcher, guidance: DualGuidance, door: Door | None = None) -> None:
        super().__init__(model)
        self.guidance, self._door = guidance, door or nullcontext()

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None
    ) -> torch.Tensor:
        with self._door:
            return predict(self, self.guidance, x, timestep, model_options or {})


@dataclass(frozen=True, eq=False)
class _Predict:
    """PREDICT_NOISE: dual guidance instead of the guider's own prediction, inside all other wrappers."""

    guidance: DualGuidance
    door: Door

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> torch.Tensor:
        guider: Any = executor.class_obj
        with self.door:
            self._check(guider, executor.original)

        def innermost(
            x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None
        ) -> torch.Tensor:
            with self.door:
                return predict(guider, self.guidance, x, timestep, model_options or {})

        rest = WrapperExecutor.new_class_executor(innermost, guider, executor.wrappers, executor.idx + 1)
        return rest.execute(*args, **kwargs)

    def _check(self, guider: CFGGuider, own: Callable) -> None:
        if isinstance(guider, DualGuider) or set(guider.conds) != {"positive", "negative"}:
            raise ValueError(
                f"needs a sampler with one positive and one negative conditioning (KSampler, "
                f"CFGGuider), but the guider is {type(guider).__name__} with "
                f"{', '.join(guider.conds) or 'none'}: remove this node, or use another guider"
            )
        if getattr(own, "__func__", own) is not CFGGuider.predict_noise:
            raise ValueError(
                f"the guider {type(guider).__name__} has its own prediction (as DualModelGuider "
                "and guiders with a schedule have), which dual guidance would replace: remove this node, or "
                "use KSampler or CFGGuider"
            )


def apply_guidance(model: ModelPatcher, guidance: DualGuidance, door: Door | None = None) -> ModelPatcher:
    """A clone of `model` with dual guidance, for any sampler with one positive and one negative conditioning.

    The sampler's own cfg is not used. door: context that is entered in every step.

    Raises ValueError if the model already has dual guidance.
    """
    if model.get_wrappers(WrappersMP.PREDICT_NOISE, KEY):
        raise ValueError("this MODEL has dual guidance already: remove one of the two nodes")
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _Predict(guidance, door or nullcontext()))
    return patched


def predict(
    guider: CFGGuider, guidance: DualGuidance, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """The guided denoised prediction, [images, ...].

    guider: in a run, with `positive` (the edit description) and `negative` (the unconditional one).
    x: [images, ...].
    sigma: [images].
    options: the call's model options.
    """
    model = guider.inner_model
    bridged = has_bridge(guider.model_patcher)
    texts = {True: guider.conds["positive"], False: guider.conds["negative"]}
    rows = guidance.rows(bridged)
    if any(options.get(name) for name in _PAIRED):
        rows = [EDIT, UNCONDITIONAL, *(row for row in rows if row not in (EDIT, UNCONDITIONAL))]
    found = predict_rows(model, rows, texts, x, sigma, options)

    image, text = guidance.image, guidance.text
    if guidance.schedule is not None:
        image, text = guidance.schedule.at(progress(model.model_sampling, sigma[:1])[0])
    call = {"sigma": sigma, "timestep": sigma, "input": x, "model": model, "model_options": options}
    for function in options.get("sampler_pre_cfg_function", []):
        pair = [found[EDIT], found[UNCONDITIONAL]]
        found[EDIT], found[UNCONDITIONAL] = function(
            {**call, "conds": [texts[True], texts[False]], "conds_out": pair, "cond_scale": text}
        )[:2]

    nothing = torch.zeros_like(x)
    edit = found.get(EDIT, nothing)
    unconditional = found.get(UNCONDITIONAL, found.get(Row(False, False), nothing))
    call |= {"cond_scale": text, "cond_denoised": edit, "uncond_denoised": unconditional}
    if EDIT not in found or UNCONDITIONAL not in found:
        result, weights = nothing, guidance.weights(image, text)
    else:
        result, weights = unconditional + (edit - unconditional) * text, guidance.image_term(image)
        if own_cfg := options.get("sampler_cfg_function"):
            pair = {"cond": x - edit, "uncond": x - unconditional}
            entries = {"input_cond": texts[True], "input_uncond": texts[False]}
            result = x - own_cfg({**call, **pair, **entries})
    for row, weight in _merged(weights, bridged).items():
        if row in found and not (isinstance(weight, float) and weight == 0):
            result = result + weight * found[row]
    for function in options.get("sampler_post_cfg_function", []):
        result = function({**call, "denoised": result, "cond": texts[True], "uncond": texts[False]})
    return result
