"""Dual guidance (DescriptiveEdit, arXiv 2508.20505): one scale for keeping the image, one for the text.

With I the reference, T the edit description and 0 for neither, and every prediction in denoised space, where
the sums are the same as for the noise:

    paper    e(0,0) + image (e(I,0) - e(0,0)) + text (e(I,T) - e(I,0))
    release  e(I,0) + text (e(I,T) - e(I,0)) + image (e(I,T) - e(0,T))
    image    e(0,T) + image (e(I,T) - e(0,T))

The first two are classifier-free guidance on the text pair e(I,T), e(I,0) with the scale `text`, plus an
image term. `image` is that term alone, for models that have learned text guidance (distilled ones) and need
no unconditional description; it is OminiControl's image guidance (arXiv 2411.15098), and our choice for
them. `automatic` is `image` on such a model and `paper` on any other.
Other packs' functions are called in the host's order: pre-CFG functions on the text pair, a CFG function in
place of the pair's own sum, post-CFG functions on the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from comfy.supported_models import FluxSchnell

from ..host.sigmas import progress
from .apply import has_bridge
from .core import Door
from .guidance_rows import EDIT, UNCONDITIONAL, Row, predict_rows

KEY = "descriptive_edit.guidance"
AUTOMATIC = "automatic"
FORMULAS = (AUTOMATIC, "paper", "release", "image")
_TABLE = 1000
# Model options of other nodes that need both descriptions' predictions; the last one also at scale 1.
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

    image, text: the two scales, any finite numbers. The formula `image` does not use `text`.
    formula: one of FORMULAS.
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

    def on(self, model: ModelPatcher) -> DualGuidance:
        """The same with the formula that `automatic` stands for on this model."""
        if self.formula != AUTOMATIC:
            return self
        return replace(self, formula="image" if _distilled(model) else "paper")

    def image_term(self, image: Scale) -> dict[Row, Scale]:
        """Each prediction's weight in the term that is added to text guidance; they sum to 0."""
        if self.formula == "paper":
            return {UNCONDITIONAL: image - 1, Row(False, False): 1 - image}
        if self.formula == "image":
            return {EDIT: image - 1, Row(False, True): 1 - image}
        return {EDIT: image, Row(False, True): -image}

    def text_scale(self, text: Scale) -> Scale:
        """The scale of the text pair; 1 leaves the edit description's prediction as it is."""
        return 1.0 if self.formula == "image" else text

    def weights(self, image: Scale, text: Scale) -> dict[Row, Scale]:
        """Each prediction's weight in the result; they sum to 1."""
        text = self.text_scale(text)
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
    """GUIDER with dual guidance; `set_conds(edit, unconditional)`, or `set_conds(edit)` for rows with the
    edit description alone.

    door: context that is entered in every step.
    """

    def __init__(self, model: ModelPatcher, guidance: DualGuidance, door: Door | None = None) -> None:
        super().__init__(model)
        self.guidance, self._door = guidance.on(model), door or nullcontext()

    def set_conds(self, positive: list[Any], negative: list[Any] | None = None) -> None:
        conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        self.inner_set_conds(conds)

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
        if isinstance(guider, DualGuider) or set(guider.conds) - {"negative"} != {"positive"}:
            raise ValueError(
                f"needs a sampler with one positive and at most one negative conditioning (KSampler, "
                f"CFGGuider, BasicGuider), but the guider is {type(guider).__name__} with "
                f"{', '.join(guider.conds) or 'none'}: remove this node, or use another guider"
            )
        if getattr(own, "__func__", own) is not CFGGuider.predict_noise:
            raise ValueError(
                f"the guider {type(guider).__name__} has its own prediction (as DualModelGuider "
                "and guiders with a schedule have), which dual guidance would replace: remove this node, or "
                "use KSampler or CFGGuider"
            )


def apply_guidance(model: ModelPatcher, guidance: DualGuidance, door: Door | None = None) -> ModelPatcher:
    """A clone of `model` with dual guidance, for any sampler with one positive conditioning and one negative
    or none.

    The sampler's own cfg is not used. door: context that is entered in every step.

    Raises ValueError if the model already has dual guidance.
    """
    if model.get_wrappers(WrappersMP.PREDICT_NOISE, KEY):
        raise ValueError("this MODEL has dual guidance already: remove one of the two nodes")
    patched = model.clone()
    wrapper = _Predict(guidance.on(model), door or nullcontext())
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, wrapper)
    return patched


def predict(
    guider: CFGGuider, guidance: DualGuidance, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """The guided denoised prediction, [images, ...].

    guider: in a run, with `positive` (the edit description) and, if a row needs it, `negative` (the
        unconditional one).
    x: [images, ...].
    sigma: [images].
    options: the call's model options.

    Raises ValueError if a row needs the unconditional description and there is none.
    """
    model = guider.inner_model
    bridged = has_bridge(guider.model_patcher)
    texts = {True: guider.conds["positive"], False: guider.conds.get("negative")}
    rows, alone = guidance.rows(bridged), guidance.formula == "image"
    if texts[False] is None:
        _check_rows(guidance, rows)
    elif any(options.get(name) for name in (_PAIRED[-1:] if alone else _PAIRED)):
        rows = [EDIT, UNCONDITIONAL, *(row for row in rows if row not in (EDIT, UNCONDITIONAL))]
    found = predict_rows(model, rows, texts, x, sigma, options)

    image, text = guidance.image, guidance.text
    if guidance.schedule is not None:
        image, text = guidance.schedule.at(progress(model.model_sampling, sigma[:1])[0])
    text = guidance.text_scale(text)
    call = {"sigma": sigma, "timestep": sigma, "input": x, "model": model, "model_options": options}
    nothing = torch.zeros_like(x)
    if alone and EDIT in found:
        found.setdefault(UNCONDITIONAL, nothing)  # as the host does at cfg 1
    for function in options.get("sampler_pre_cfg_function", []):
        pair = [found.get(EDIT, nothing), found.get(UNCONDITIONAL, nothing)]
        found[EDIT], found[UNCONDITIONAL] = function(
            {**call, "conds": [texts[True], texts[False]], "conds_out": pair, "cond_scale": text}
        )[:2]

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


def _check_rows(guidance: DualGuidance, rows: list[Row]) -> None:
    """Raise ValueError unless these rows have the edit description alone."""
    if not all(row.text for row in rows):
        raise ValueError(
            f"no unconditional (or negative) description is connected, but the formula {guidance.formula} "
            "needs it with these scales: connect one, or choose the formula image, which guides by the image "
            "alone"
        )


def _distilled(model: ModelPatcher) -> bool:
    """Whether the model has learned guidance by the text, as far as it shows: by an embedding of the scale,
    or as Flux.1 schnell.
    """
    embedded = getattr(getattr(model.model.diffusion_model, "params", None), "guidance_embed", False)
    return bool(embedded) or isinstance(model.model.model_config, FluxSchnell)
