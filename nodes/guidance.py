"""Nodes for dual guidance (DescriptiveEdit, arXiv 2508.20505): a guider, a model patch and their schedule."""

from __future__ import annotations

import math
from typing import Any

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
from ..pictures.plots import draw_curves
from .errors import naming

CATEGORY = "descriptive edit/guidance"
ALIASES = ["2508.20505", "dual guidance", "DualCFG", "image guidance", "text guidance"]

ScheduleType = io.Custom("DESCEDIT_GUIDANCE_SCHEDULE")


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
            "for Chroma. 1 is neutral. With the formula paper, 0 ignores the text. Not used by the formula "
            "image.",
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
        line = [(0.0, 0.0), (1.0, 1.0)]
        return io.Schema(
            node_id="DescEditGuidanceSchedule",
            display_name="Guidance Schedule",
            category=CATEGORY,
            description=(
                "Varies image and text guidance over the sampling, along two curves from pure noise (left) "
                "to the clean image (right)."
            ),
            search_aliases=[*ALIASES, "guidance curve", "dynamic cfg"],
            inputs=[
                _scale("image_low", 1.0, "Image guidance at the bottom of its curve, -30 to 30."),
                _scale("image_high", 2.0, "Image guidance at the top of its curve, -30 to 30."),
                io.Curve.Input(
                    "image_curve", default=line, tooltip="Curve of the image guidance from noise to image."
                ),
                _scale("text_low", 7.5, "Text guidance at the bottom of its curve, -30 to 30."),
                _scale("text_high", 7.5, "Text guidance at the top of its curve, -30 to 30."),
                io.Curve.Input(
                    "text_curve", default=line, tooltip="Curve of the text guidance from noise to image."
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
        image_curve: Any,
        text_low: float,
        text_high: float,
        text_curve: Any,
    ) -> io.NodeOutput:
        tables = []
        for name, low, high, curve in (
            ("image", image_low, image_high, image_curve),
            ("text", text_low, text_high, text_curve),
        ):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(
                    f"{name}_low is {low} and {name}_high {high}, but both must be finite numbers"
                )
            tables.append(scale_table(low, high, CurveInput.from_raw(curve).interp_array))
        schedule = GuidanceSchedule(*tables)
        plot = draw_curves({"image guidance": schedule.image, "text guidance": schedule.text})
        return io.NodeOutput(schedule, plot)


NODES = [DescEditDualGuider, DescEditDualGuidance, DescEditGuidanceSchedule]
