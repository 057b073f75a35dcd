"""Saves edit pairs, made by any graph, as a folder to train a bridge on."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..patches.host.inputs import read_images
from .previews import show_images, show_text
from .saving import next_pair

CATEGORY = "descriptive edit/training"
EditPairsType = io.Custom("DESCEDIT_EDIT_PAIRS")
ALIASES = ["2508.20505", "dataset", "edit pairs", "training pair", "before after"]


def inside_input(folder: str) -> Path:
    """A folder in ComfyUI's input folder, which need not exist. Raises ValueError if it lies elsewhere."""
    base = Path(folder_paths.get_input_directory()).resolve()
    path = (base / folder).resolve()
    if not folder.strip() or path == base or not path.is_relative_to(base):
        raise ValueError(f"folder is {folder!r} but must be a folder inside ComfyUI's input folder")
    return path


class DescEditSavePair(io.ComfyNode):
    """Node: `training.pairs.write_pair`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditSavePair",
            display_name="Save Edit Pair",
            category=CATEGORY,
            description=(
                "Saves an image, its edit and both descriptions as a pair that Edit Pairs from Folder reads: "
                "pair_00001_source.png, pair_00001_edit.png and pair_00001.json, then pair_00002 and so on."
            ),
            search_aliases=ALIASES,
            is_output_node=True,
            inputs=[
                io.Image.Input("source", tooltip="The image before the edit, or several."),
                io.Image.Input(
                    "edited", tooltip="The image after the edit, in the same size; one for each source."
                ),
                io.String.Input(
                    "source_description",
                    multiline=True,
                    tooltip="What the source shows. Not empty. The first 75 tokens are used.",
                ),
                io.String.Input(
                    "edit_description",
                    multiline=True,
                    tooltip="What the edited image shows: the final look, not the change. Not empty.",
                ),
                io.String.Input(
                    "folder",
                    default="edit_pairs",
                    tooltip="A folder in ComfyUI's input folder. It is made if it does not exist.",
                ),
            ],
            outputs=[io.String.Output("names", tooltip="The pairs' names, one per line.")],
        )

    @classmethod
    def execute(
        cls,
        source: torch.Tensor,
        edited: torch.Tensor,
        source_description: str,
        edit_description: str,
        folder: str,
    ) -> io.NodeOutput:
        from ..training.pairs import write_pair

        path = inside_input(folder)
        source, edited = read_images("source", source), read_images("edited", edited)
        if source.shape != edited.shape:
            raise ValueError(
                f"edited has shape {list(edited.shape)} but source {list(source.shape)}: give one edited "
                "image of the same size for each source"
            )
        texts = {"source": source_description.strip(), "edit": edit_description.strip()}
        for name, text in texts.items():
            if not text:
                raise ValueError(f"{name}_description is empty: describe what the image shows")
        names = []
        for before, after in zip(source, edited, strict=True):
            name = next_pair(path)
            write_pair(path, name, before, after, **texts)
            names.append(name)
        show_text(f"{names[-1]} in {folder}")
        return io.NodeOutput("\n".join(names), ui=show_images(cls, source, edited))


NODES = [DescEditSavePair]
