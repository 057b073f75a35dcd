"""Nodes for inspecting an edit: attention maps, and images side by side."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..patches.attention.maps import LatentSource, capture_attention, draw_maps
from ..patches.host.inputs import read_images, samples_of
from ..patches.inversion import Inversion
from ..patches.unify.tokens import EditTokens
from ..pictures.contact_sheet import draw_sheet
from .describe import EditTokensType
from .inversion import InversionType
from .previews import show_images

CATEGORY = "descriptive edit/evaluation"


class DescEditAttentionMaps(io.ComfyNode):
    """Node: `patches.attention.maps.capture_attention`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditAttentionMaps",
            display_name="Attention Maps",
            is_output_node=True,
            category=CATEGORY,
            description=(
                "Shows what the model attends to at one point of the sampling: for each word where in the "
                "image it acts, and the layout that self-attention sees, as colours. UnifyEdit's losses "
                "compare these maps."
            ),
            search_aliases=["cross attention", "self attention", "heat map", "DAAM", "daam"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.x, SD2.x, SDXL, Flux.1, Flux.2 or Chroma, with its patches."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The encoded description in which the tokens were found.",
                ),
                EditTokensType.Input(
                    "edit_tokens", tooltip="The words to show, from Describe Edit or Find Edit Tokens."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The image, from VAEEncode; noise from the seed is added. Connect this or an "
                    "inversion.",
                ),
                InversionType.Input(
                    "inversion",
                    optional=True,
                    tooltip="From Invert Image: uses the step of its path nearest to percent. Connect this "
                    "or a latent.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The image under the word maps: one, or one for each. Not connected: the maps "
                    "are shown alone.",
                ),
                io.Float.Input(
                    "percent",
                    default=0.3,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Point of the sampling, 0 to 0.99: 0 is pure noise, 0.99 almost the clean image.",
                ),
                io.Int.Input(
                    "cross_attn_res",
                    default=16,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Words are shown at the grid nearest to this many tokens per side, 1 to 64. 1: "
                    "the model's coarsest grid.",
                ),
                io.Int.Input(
                    "self_attn_res",
                    default=32,
                    min=1,
                    max=32,
                    advanced=True,
                    tooltip="Self-attention is shown at the grid nearest to this many tokens per side, 1 to "
                    "32. 1: the model's coarsest grid. 32 takes about a second on a CPU.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    advanced=True,
                    tooltip="Seed of the noise added to latent, 0 or more. Not used with an inversion.",
                ),
                io.Int.Input(
                    "side",
                    default=256,
                    min=64,
                    max=1024,
                    advanced=True,
                    tooltip="Longer side of each image in pixels, 64 to 1024.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "words",
                    tooltip="One map per word, each scaled from its own lowest value (blue) to its highest "
                    "(yellow).",
                ),
                io.Image.Output(
                    "structure",
                    tooltip="The three leading components of self-attention as red, green and blue: "
                    "positions with similar attention have similar colours.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditioning: list[Any],
        edit_tokens: EditTokens,
        percent: float,
        cross_attn_res: int,
        self_attn_res: int,
        seed: int,
        side: int,
        latent: dict[str, Any] | None = None,
        inversion: Inversion | None = None,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        image = None if image is None else read_images("image", image)
        samples = None if latent is None else samples_of("latent", latent)
        source = LatentSource(percent, samples, inversion, seed)
        maps = capture_attention(model, conditioning, edit_tokens, source, cross_attn_res, self_attn_res)
        words, structure = draw_maps(maps, image, side)
        return io.NodeOutput(words, structure, ui=show_images(cls, words, structure))


class DescEditCompare(io.ComfyNode):
    """Node: `pictures.contact_sheet.draw_sheet`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        image = io.Image.Input("image", tooltip="One image, or one for each row.")
        return io.Schema(
            node_id="DescEditCompare",
            display_name="Contact Sheet (labelled)",
            is_output_node=True,
            category=CATEGORY,
            description=(
                "Puts images side by side under labels in one image: a column for each input, a row for "
                "each image of a batch."
            ),
            search_aliases=["contact sheet", "grid", "side by side", "comparison", "before after"],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(image, prefix="image", min=1, max=24),
                    tooltip="Up to 24 inputs, one column each. A single image is repeated in every row.",
                ),
                io.String.Input(
                    "labels",
                    default="source\nedited",
                    multiline=True,
                    optional=True,
                    tooltip="A label for each input, one per line. Missing labels are left empty; more "
                    "labels than inputs is an error.",
                ),
                io.Int.Input(
                    "side",
                    default=320,
                    min=64,
                    max=2048,
                    optional=True,
                    tooltip="Longer side of each image in the sheet, 64 to 2048 pixels.",
                ),
            ],
            outputs=[io.Image.Output("sheet")],
        )

    @classmethod
    def execute(cls, images: dict[str, torch.Tensor], labels: str = "", side: int = 320) -> io.NodeOutput:
        shown = [read_images(name, image) for name, image in images.items() if image is not None]
        titles = labels.strip("\n").split("\n") if labels.strip() else []
        if len(titles) > len(shown):
            raise ValueError(
                f"labels has {len(titles)} lines but {len(shown)} images are connected: "
                "give one line for each"
            )
        titles += [""] * (len(shown) - len(titles))
        sheet = draw_sheet(list(zip(titles, shown, strict=True)), side)
        return io.NodeOutput(sheet, ui=show_images(cls, sheet))


NODES = [DescEditAttentionMaps, DescEditCompare]
