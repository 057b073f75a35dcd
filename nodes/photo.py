"""Nodes that cut the part of a photo that is edited, and put the edit back at full size."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..patches.host.inputs import read_images, read_mask
from ..pictures.crop import Crop, crop, stitch
from .previews import show_images

CATEGORY = "descriptive edit/photo"
ALIASES = ["crop and stitch", "inpaint crop", "photo", "image edit", "full size"]

CropType = io.Custom("DESCEDIT_CROP")


class DescEditCrop(io.ComfyNode):
    """Node: `pictures.crop.crop`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditCrop",
            display_name="Crop for Edit",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Cuts the box around the edit mask out of a photo and scales it, with the mask, to the size "
                "that a model takes. Stitch Edit puts the edited crop back at full size."
            ),
            search_aliases=[*ALIASES, "resize image and mask", "fit to model"],
            inputs=[
                io.Image.Input("image", tooltip="The photo, in any size and shape."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Edit region: 1 = edit, 0 = keep, in the photo's size. Not connected or all 0, "
                    "as Load Image gives it if nothing is painted: the whole photo.",
                ),
                io.Int.Input(
                    "side",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="The crop is scaled to about side x side pixels, 64 to 2048, both sides "
                    "multiples of 64. 512 for SD1.x, 768 for SD2.x, 1024 for SDXL, 128 for the Tiny Studio.",
                ),
                io.Float.Input(
                    "context",
                    default=2.0,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Size of the crop in sizes of the mask's box, 1 to 10. 1: the box alone. High "
                    "values show the model more of the photo and leave fewer pixels to the edit.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The crop."),
                io.Mask.Output("mask", tooltip="The mask in the crop; 1 everywhere without a mask."),
                CropType.Output("crop", tooltip="For Stitch Edit."),
            ],
        )

    @classmethod
    def execute(
        cls, image: torch.Tensor, side: int, context: float, mask: torch.Tensor | None = None
    ) -> io.NodeOutput:
        mask = None if mask is None else read_mask("mask", mask)
        cut, region, rest = crop(read_images("image", image), mask, side, context)
        return io.NodeOutput(cut, region, rest, ui=show_images(cls, cut))


class DescEditStitch(io.ComfyNode):
    """Node: `pictures.crop.stitch`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditStitch",
            display_name="Stitch Edit",
            category=CATEGORY,
            description=(
                "Puts an edited crop back into the photo at full size. Outside the mask every pixel stays "
                "as it was."
            ),
            search_aliases=[*ALIASES, "paste back", "composite", "before after"],
            inputs=[
                CropType.Input("crop", tooltip="From Crop for Edit."),
                io.Image.Input("edited", tooltip="The edited crop, in any size."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Edit region in the crop, such as the mask of UnifyEdit; what lies outside the "
                    "painted mask is kept anyway. Not connected: the painted mask, or the whole photo.",
                ),
                io.Int.Input(
                    "blend",
                    default=8,
                    min=0,
                    max=64,
                    tooltip="Width in pixels of the edge, inside the mask, over which photo and edit mix, 0 "
                    "to 64. 0: a sharp edge.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The whole photo with the edit.")],
        )

    @classmethod
    def execute(
        cls, crop: Crop, edited: torch.Tensor, blend: int, mask: torch.Tensor | None = None
    ) -> io.NodeOutput:
        mask = None if mask is None else read_mask("mask", mask)
        return io.NodeOutput(stitch(crop, read_images("edited", edited), mask, blend))


NODES = [DescEditCrop, DescEditStitch]
