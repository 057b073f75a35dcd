"""Nodes for dual guidance (DescriptiveEdit, arXiv 2508.20505): a guider, a model patch and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.input import CurveInput
from comfy_api.latest import io

from ..patches.bridge.guidance import (
    FORMULAS,
    DualGuidance,
    DualGuider,
    GuidanceSchedule,
    apply_guidance,
    scale_table,
)
from ..patches.host.inputs import read_samples, samples_of
from ..patches.host.sigmas import schedule
from ..pictures.contact_sheet import draw_sheet
from ..pictures.plots import draw_curves
from .errors import naming
from .previews import show_images, show_text

CATEGORY = "descriptive edit/guidance"
ALIASES = ["2508.20505", "dual guidance", "DualCFG", "image guidance", "text guidance"]

ScheduleType = io.Custom("DESCEDIT_GUIDANCE_SCHEDULE")
_MOST = 8  # scales of a grid in each direction
CurveType = io.Custom("CURVE")
# From 0 at noise to 1 at the image, [points] to [points].
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rising": lambda p: p,
    "falling": lambda p: 1 - p,
    "high in the middle": lambda p: np.sin(np.pi * p),
    "low in the middle": lambda p: 1 - np.sin(np.pi * p),
    "high in the first half": lambda p: (p < 0.5).astype(p.dtype),
    "high in the second half": lambda p: (p >= 0.5).astype(p.dtype),
}
_SHAPES = "its course from noise to image. rising and falling are straight lines, the halves are steps."


def _scale(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=-30.0, max=30.0, step=0.05, tooltip=tooltip)


def _inputs() -> list[Any]:
    return [
        _scale(
            "image_guidance",
            DualGuidance.image,
            "How strongly to keep the source image, -30 to 30. paper and image: 1 to 2.5 is usual, 1 is "
            "neutral and the fastest, 0 ignores the image. release: the authors' code uses 1.5, 0 is "
            "neutral.",
        ),
        _scale(
            "text_guidance",
            DualGuidance.text,
            "How strongly to follow the edit description, -30 to 30, like cfg elsewhere: 7.5 for SD, about 4 "
            "for Chroma, SD3.5 and Qwen-Image. 1 is neutral. With the formula paper, 0 ignores the text. Not "
            "used by the formula image.",
        ),
        io.Combo.Input(
            "formula",
            options=list(FORMULAS),
            tooltip="paper: the text scale builds on the image scale. release: the formula of the authors' "
            "code, where the image scale moves away from the prediction without the reference. image: the "
            "image scale alone, for distilled models (Flux.1 dev and schnell, Flux.2), which need no "
            "unconditional description; the text's scale is then FluxGuidance. automatic: image on Flux.1 "
            "dev and schnell and on Flux.2 dev, paper on all others.",
        ),
        ScheduleType.Input(
            "schedule",
            optional=True,
            tooltip="Scales that change over the sampling. Connected: replaces the two values above.",
        ),
    ]


class DescEditDualGuider(io.ComfyNode):
    """Node: `patches.bridge.guidance.DualGuider`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditDualGuider",
            display_name="Dual Guider (image and text)",
            category=CATEGORY,
            description=(
                "A GUIDER with two scales: how strongly to keep the source image and how strongly to follow "
                "the edit description. For a model with an attention bridge; without one it is plain text "
                "guidance."
            ),
            search_aliases=["DescriptiveEdit dual guidance", *ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="From Apply Attention Bridge."),
                io.Conditioning.Input("edit", tooltip="The edit description: what the edited image shows."),
                io.Conditioning.Input(
                    "unconditional",
                    optional=True,
                    tooltip="The empty text, or a negative prompt, that both scales move away from. Not "
                    "needed with the formula image.",
                ),
                *_inputs(),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        edit: list[Any],
        image_guidance: float,
        text_guidance: float,
        formula: str,
        unconditional: list[Any] | None = None,
        schedule: GuidanceSchedule | None = None,
    ) -> io.NodeOutput:
        guidance = DualGuidance(image_guidance, text_guidance, formula, schedule)
        guider = DualGuider(model, guidance, naming(cls))
        guider.set_conds(edit, unconditional)
        return io.NodeOutput(guider)


class DescEditDualGuidance(io.ComfyNode):
    """Node: `patches.bridge.guidance.apply_guidance`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditDualGuidance",
            display_name="Dual Guidance (for KSampler)",
            category=CATEGORY,
            description=(
                "The Dual Guider for samplers that build their own guider, such as KSampler. positive is "
                "the edit description, negative the unconditional one, if there is one. The sampler's cfg "
                "has no effect."
            ),
            search_aliases=["DescriptiveEdit dual guidance", *ALIASES, "KSampler"],
            inputs=[
                io.Model.Input("model", tooltip="With or without an attention bridge."),
                *_inputs(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        image_guidance: float,
        text_guidance: float,
        formula: str,
        schedule: GuidanceSchedule | None = None,
    ) -> io.NodeOutput:
        guidance = DualGuidance(image_guidance, text_guidance, formula, schedule)
        return io.NodeOutput(apply_guidance(model, guidance, naming(cls)))


class DescEditGuidanceSchedule(io.ComfyNode):
    """Node: `patches.bridge.guidance.GuidanceSchedule`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditGuidanceSchedule",
            display_name="Guidance Schedule",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Varies image and text guidance over the sampling, from pure noise to the clean image. Each "
                "goes from its low to its high value in a shape of its own."
            ),
            search_aliases=[*ALIASES, "guidance curve", "dynamic cfg"],
            inputs=[
                _scale("image_low", 1.0, "Image guidance where its shape is lowest, -30 to 30."),
                _scale("image_high", 2.0, "Image guidance where its shape is highest, -30 to 30."),
                io.Combo.Input("image_shape", options=list(SHAPES), tooltip=f"Image guidance: {_SHAPES}"),
                _scale("text_low", 7.5, "Text guidance where its shape is lowest, -30 to 30."),
                _scale("text_high", 7.5, "Text guidance where its shape is highest, -30 to 30."),
                io.Combo.Input("text_shape", options=list(SHAPES), tooltip=f"Text guidance: {_SHAPES}"),
                *(
                    CurveType.Input(
                        f"{name}_curve",
                        optional=True,
                        tooltip=f"A curve of your own, from Curve Editor. Connected: replaces {name}_shape.",
                        extra_dict={"forceInput": True},
                    )
                    for name in ("image", "text")
                ),
            ],
            outputs=[
                ScheduleType.Output("schedule"),
                io.Image.Output("plot", tooltip="Both scales over the sampling."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image_low: float,
        image_high: float,
        image_shape: str,
        text_low: float,
        text_high: float,
        text_shape: str,
        image_curve: CurveInput | None = None,
        text_curve: CurveInput | None = None,
    ) -> io.NodeOutput:
        tables = []
        for name, low, high, shape, curve in (
            ("image", image_low, image_high, image_shape, image_curve),
            ("text", text_low, text_high, text_shape, text_curve),
        ):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(
                    f"{name}_low is {low} and {name}_high {high}, but both must be finite numbers"
                )
            along = SHAPES[shape] if curve is None else CurveInput.from_raw(curve).interp_array
            tables.append(scale_table(low, high, along))
        schedule = GuidanceSchedule(*tables)
        plot = draw_curves({"image guidance": schedule.image, "text guidance": schedule.text})
        return io.NodeOutput(schedule, plot, ui=show_images(cls, plot))


class DescEditGuidanceGrid(io.ComfyNode):
    """Node: one edit at every pair of an image and a text guidance, as a labelled sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditGuidanceGrid",
            display_name="Guidance Grid",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Makes one edit at every pair of image and text guidance and shows them in a labelled grid: "
                "image guidance grows to the right, text guidance downwards. The sampler is Euler."
            ),
            search_aliases=[*ALIASES, "XY plot", "grid", "compare guidance"],
            inputs=[
                io.Model.Input("model", tooltip="From Apply Attention Bridge."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input("edit", tooltip="The edit description: what the edited image shows."),
                io.Conditioning.Input(
                    "unconditional",
                    tooltip="The empty text, or a negative prompt, that both scales move away from.",
                ),
                io.Latent.Input("latent", tooltip="Any latent of the size to sample. Only its size is used."),
                io.String.Input(
                    "image_guidance",
                    default="1, 1.5, 2.5",
                    tooltip="Up to 8 numbers with commas between: how strongly to keep the source. 0 ignores "
                    "it.",
                ),
                io.String.Input(
                    "text_guidance",
                    default="3, 7.5, 12",
                    tooltip="Up to 8 numbers with commas between: how strongly to follow the edit "
                    "description.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=10000, tooltip="Steps of each sampling, 1 to 10,000."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise, the same in every cell.",
                ),
            ],
            outputs=[io.Image.Output("sheet")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any,
        edit: list[Any],
        unconditional: list[Any],
        latent: dict[str, Any],
        image_guidance: str,
        text_guidance: str,
        steps: int,
        seed: int,
    ) -> io.NodeOutput:
        columns, rows = _numbers("image_guidance", image_guidance), _numbers("text_guidance", text_guidance)
        samples = torch.zeros_like(read_samples("latent", samples_of("latent", latent), model)[:1])
        sigmas = schedule(model, "normal", steps, 1.0)
        bar = comfy.utils.ProgressBar(len(columns) * len(rows))
        pictures: dict[str, list[torch.Tensor]] = {f"image {scale:g}": [] for scale in columns}
        for image, column in zip(columns, pictures.values(), strict=True):
            for text in rows:
                show_text(f"image {image:g}, text {text:g}")
                guider = DualGuider(model, DualGuidance(image, text), naming(cls))
                guider.set_conds(edit, unconditional)
                sampled = guider.sample(
                    comfy.sample.prepare_noise(samples, seed),
                    samples,
                    comfy.samplers.sampler_object("euler"),
                    sigmas,
                    disable_pbar=True,
                    seed=seed,
                )
                column.append(vae.decode(sampled))
                bar.update(1)
        captions = [[f"image {image:g}, text {text:g}" for image in columns] for text in rows]
        sheet = draw_sheet([(name, torch.cat(column)) for name, column in pictures.items()], 160, captions)
        return io.NodeOutput(sheet, ui=show_images(cls, sheet))


def _numbers(name: str, text: str) -> list[float]:
    """One to eight different numbers of a text."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not (0 < len(found) <= _MOST and len(set(found)) == len(found) and all(map(math.isfinite, found))):
        raise ValueError(
            f"{name} is {text!r} but must be 1 to {_MOST} different numbers with commas between, such as "
            "0, 1, 4"
        )
    return found


NODES = [DescEditDualGuider, DescEditDualGuidance, DescEditGuidanceSchedule, DescEditGuidanceGrid]
