"""The small model that ships with the pack and its scenes, for a first run without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from ..models.bridge_file import load_bridge
from ..models.tiny_studio import drawing, flux, scenes, studio
from .bridge import BridgeType
from .pairs import EditPairsType
from .previews import show_images, show_text

CATEGORY = "descriptive edit/tiny studio"
ALIASES = ["Tiny Studio", "tiny model", "demo model"]
UNET, FLUX = "UNet", "Flux"


class DescEditTinyStudio(io.ComfyNode):
    """Node: `models.tiny_studio.studio`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditTinyStudio",
            display_name="Load Tiny Studio",
            category=CATEGORY,
            description=(
                "Loads the small model that ships with the pack: Stable Diffusion 1.5's layout at reduced "
                "width, or a network of Flux.1's kind, 128x128 pixels. It draws coloured shapes and cartoon "
                "faces only. It works with the stock nodes, so every method can be tried in seconds without "
                "a download. The attention bridge of each is included."
            ),
            search_aliases=[*ALIASES, "tiny flux"],
            inputs=[
                io.Combo.Input(
                    "network",
                    options=[UNET, FLUX],
                    default=UNET,
                    optional=True,
                    tooltip="UNet: Stable Diffusion 1.5's layout. Flux: a network of Flux.1's kind, a flow "
                    "model; it reads at most 31 tokens of a text. Both have the same clip and vae.",
                ),
            ],
            outputs=[
                io.Model.Output("model"),
                io.Clip.Output("clip"),
                io.Vae.Output("vae"),
                BridgeType.Output(
                    "bridge",
                    tooltip="The network's attention bridge, trained on edits of its drawn scenes.",
                ),
            ],
        )

    @classmethod
    def execute(cls, network: str = UNET) -> io.NodeOutput:
        if network == FLUX:
            model, bridge = flux.load_model(), flux.BRIDGE
        else:
            model, bridge = studio.load_model(), studio.BRIDGE
        return io.NodeOutput(model, studio.load_clip(), studio.load_vae(), load_bridge(bridge))


class DescEditTinyScene(io.ComfyNode):
    """Node: `models.tiny_studio.scenes.sample_edit`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditTinyScene",
            display_name="Draw Tiny Scene",
            has_intermediate_output=True,
            category=CATEGORY,
            description=(
                "Draws a scene for the Tiny Studio and its true edit, with exact descriptions of both and a "
                "mask of where they differ. The model did not see these combinations in training."
            ),
            search_aliases=[*ALIASES, "sample image", "test image", "edit pair"],
            inputs=[
                io.Combo.Input(
                    "edit_type",
                    options=[*scenes.EDIT_TYPES, scenes.TWO],
                    tooltip="What the edit changes: an object's colour, its texture, the object itself, the "
                    "background, the style of the whole image, or a face's expression or glasses. two "
                    "objects: the colour, texture or shape of one of two objects side by side.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=True,
                    tooltip="Number of the scene, 0 to 2147483647. The same number always gives the same "
                    "scene.",
                ),
                io.Combo.Input(
                    "wording",
                    options=list(scenes.WORDINGS),
                    default="complex",
                    tooltip="simple: the descriptions name the object and what changes. complex: they name "
                    "everything in the image, so the model keeps more of it.",
                ),
            ],
            outputs=[
                io.Image.Output("source", tooltip="The scene, 128x128."),
                io.Image.Output("edited", tooltip="The scene as a perfect edit would make it."),
                io.Mask.Output("mask", tooltip="1 in the edit region; 1 everywhere for a style."),
                io.String.Output("source_description"),
                io.String.Output("edit_description"),
            ],
        )

    @classmethod
    def execute(cls, edit_type: str, seed: int, wording: str) -> io.NodeOutput:
        pair = scenes.sample_edit(edit_type, seed, wording, held=True)
        mask = pair.mask()
        mask = np.ones((drawing.SIZE, drawing.SIZE), np.float32) if mask is None else mask
        source, target, mask = (
            torch.from_numpy(array)[None] for array in (pair.source.draw(), pair.target.draw(), mask)
        )
        show_text(f"{pair.source_text}\n{pair.edit_text}")
        return io.NodeOutput(
            source, target, mask, pair.source_text, pair.edit_text, ui=show_images(cls, source)
        )


class DescEditTinyPairs(io.ComfyNode):
    """Node: `models.tiny_studio.scenes.sample_edit`, encoded by `training.cache.encode_pairs`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditTinyPairs",
            display_name="Draw Tiny Pairs",
            category=CATEGORY,
            description=(
                "Draws edit pairs for the Tiny Studio, to try Train Attention Bridge without a download. "
                "Draw Tiny Scene draws other scenes, which can show what was learned."
            ),
            search_aliases=[*ALIASES, "edit pairs", "training data"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Load Tiny Studio."),
                io.Clip.Input("clip", tooltip="From Load Tiny Studio."),
                io.Combo.Input(
                    "edit_type",
                    options=list(scenes.EDIT_TYPES),
                    tooltip="What the edits of the pairs change.",
                ),
                io.Int.Input(
                    "pairs", default=128, min=1, max=10_000, tooltip="Number of pairs, 1 to 10,000."
                ),
                io.Combo.Input(
                    "wording",
                    options=list(scenes.WORDINGS),
                    tooltip="simple: the descriptions name the object and what changes, so all else must "
                    "come from the source. complex: they name everything in the image.",
                ),
            ],
            outputs=[EditPairsType.Output("pairs")],
        )

    @classmethod
    def execute(cls, vae: Any, clip: Any, edit_type: str, pairs: int, wording: str) -> io.NodeOutput:
        from ..training.cache import encode_pairs
        from ..training.pairs import EditPair

        drawn = (scenes.sample_edit(edit_type, seed, wording) for seed in range(pairs))
        images = (
            EditPair(
                f"{edit_type} {number}",
                torch.from_numpy(pair.source.draw()),
                torch.from_numpy(pair.target.draw()),
                pair.source_text,
                pair.edit_text,
            )
            for number, pair in enumerate(drawn)
        )
        bar = comfy.utils.ProgressBar(pairs)
        cache = Path(folder_paths.get_temp_directory()) / "edit_pairs"
        return io.NodeOutput(encode_pairs(images, vae, clip, cache, bar.update_absolute))


NODES = [DescEditTinyStudio, DescEditTinyScene, DescEditTinyPairs]
