"""Nodes for DescriptiveEdit's attention bridge (arXiv 2508.20505): load, create, save, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..models.bridge import AUTOMATIC, DIRECTIONS, FUSIONS, AttentionBridge, BridgeSettings, new_bridge
from ..models.bridge_file import files_of, load_bridge, save_bridge
from ..patches.attention.networks import network_of
from ..patches.bridge.apply import apply_bridge
from ..patches.bridge.run import BridgeSetup
from ..patches.host.inputs import samples_of
from .errors import naming
from .saving import SUFFIX, checked_name, next_path

CATEGORY = "descriptive edit/bridge"
# The node search ranks an alias higher if it has little beyond the typed text; the bare name is Apply's.
ALIASES = ["2508.20505", "attention bridge", "reference UNet", "image editing"]
FOLDER = "attention_bridges"
JOIN = ("one for each image", "all for every image")

BridgeType = io.Custom("ATTENTION_BRIDGE")

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def bridge_files() -> list[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(SUFFIX)]


def keep_bridge(bridge: AttentionBridge, stem: str) -> str:
    """Save a bridge under a checked name; returns the file name as Load Attention Bridge lists it."""
    path = next_path(_folder(), stem)
    save_bridge(bridge, path)
    return path.name


def _folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()


class DescEditLoadBridge(io.ComfyNode):
    """Node: `models.bridge_file.load_bridge`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditLoadBridge",
            display_name="Load Attention Bridge",
            category=CATEGORY,
            description=(
                "Loads an attention bridge from models/attention_bridges: a file of this pack, or the "
                "authors' release (model.safetensors beside the folder xy_lora)."
            ),
            search_aliases=["DescriptiveEdit attention bridge file", *ALIASES, "load bridge"],
            inputs=[
                io.Combo.Input(
                    "bridge_name",
                    options=bridge_files(),
                    tooltip="A safetensors file in models/attention_bridges or a subfolder. It must belong "
                    "to the base model it is applied to.",
                )
            ],
            outputs=[BridgeType.Output("bridge")],
        )

    @classmethod
    def fingerprint_inputs(cls, bridge_name: str) -> list[tuple[str, int, int]]:
        files = files_of(Path(folder_paths.get_full_path_or_raise(FOLDER, bridge_name)))
        stats = [(str(file), file.stat()) for file in files]
        return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]

    @classmethod
    def execute(cls, bridge_name: str) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise(FOLDER, bridge_name))
        try:
            return io.NodeOutput(load_bridge(path))
        except ValueError as error:
            raise ValueError(f"bridge_name: {error}") from None


class DescEditNewBridge(io.ComfyNode):
    """Node: `models.bridge.new_bridge`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditNewBridge",
            display_name="New Attention Bridge",
            category=CATEGORY,
            description=(
                "Makes an untrained attention bridge for a model. With the fusion linear it changes nothing "
                "until it is trained."
            ),
            search_aliases=[*ALIASES, "create bridge", "train"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model: SD1.x, SD2.x, SDXL, Flux.1, Flux.2, Chroma, SD3.5, "
                    "Qwen-Image, or a distilled version of them.",
                ),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="Rank of the LoRA updates on q, k, v and out, 1 to 1024. The paper uses 64. "
                    "Higher values learn more and make a larger file.",
                ),
                io.Float.Input(
                    "alpha",
                    default=64.0,
                    min=0.01,
                    max=1024.0,
                    step=0.01,
                    tooltip="The updates are scaled by alpha / rank, 0.01 to 1024. The paper uses the rank.",
                ),
                io.Combo.Input(
                    "direction",
                    options=list(DIRECTIONS),
                    default=BridgeSettings.direction,
                    tooltip="reference_queries: queries come from the reference, keys and values from the "
                    "image being denoised. Trains faster; the reference must have the same size. "
                    "edit_queries: queries come from the image being denoised, keys and values from the "
                    "reference, as in the authors' code.",
                ),
                io.Combo.Input(
                    "fusion",
                    options=list(FUSIONS),
                    tooltip="How the bridge's output is combined with the self-attention. linear: added "
                    "through a learned matrix that starts at zero. add: added directly. replace: replaces "
                    "it. add and replace change the image even untrained.",
                ),
                io.Boolean.Input(
                    "reference_self_bridge",
                    default=False,
                    advanced=True,
                    tooltip="On: the reference also passes through the bridge and attends to itself, as in "
                    "the authors' code. Off: the reference network stays frozen, and training is faster.",
                ),
                io.Int.Input(
                    "fuse_rank",
                    default=BridgeSettings.fuse_rank,
                    min=AUTOMATIC,
                    max=1024,
                    advanced=True,
                    tooltip="Rank of the matrix of the fusion linear, -1 to 1024. 0: a full matrix, which "
                    "learns fastest. -1: full as long as the file stays below 300 MB in half precision, else "
                    "256.",
                ),
            ],
            outputs=[BridgeType.Output("bridge")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        rank: int,
        alpha: float,
        direction: str,
        fusion: str,
        reference_self_bridge: bool,
        fuse_rank: int,
    ) -> io.NodeOutput:
        widths = network_of(model.model.diffusion_model).widths
        base = type(model.model.model_config).__name__
        settings = BridgeSettings(
            base, widths, rank, alpha, direction, fusion, reference_self_bridge, fuse_rank
        )
        return io.NodeOutput(new_bridge(settings))


class DescEditSaveBridge(io.ComfyNode):
    """Node: `models.bridge_file.save_bridge`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditSaveBridge",
            display_name="Save Attention Bridge",
            category=CATEGORY,
            description=(
                "Saves an attention bridge in models/attention_bridges as name_00001_.safetensors, "
                "name_00002_.safetensors and so on. No file is overwritten."
            ),
            search_aliases=[*ALIASES, "save bridge"],
            is_output_node=True,
            inputs=[
                BridgeType.Input("bridge", tooltip="The bridge to save."),
                io.String.Input(
                    "name",
                    default="bridge",
                    tooltip="File name without folder and extension, valid on every system. A number is "
                    "appended.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The file name, as Load Attention Bridge lists it.")],
        )

    @classmethod
    def execute(cls, bridge: ModelPatcher, name: str) -> io.NodeOutput:
        return io.NodeOutput(keep_bridge(bridge.model, checked_name(name)))


class DescEditApplyBridge(io.ComfyNode):
    """Node: `patches.bridge.apply.apply_bridge`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DescEditApplyBridge",
            display_name="Apply Attention Bridge",
            category=CATEGORY,
            description=(
                "Lets a model attend to a source image while it samples. The same network reads the "
                "reference once, and the bridge feeds what it saw into every self-attention. Describe the "
                "edited image in the sampler's positive prompt. LoRAs on the model affect the reference too; "
                "ControlNet and other nodes' patches affect only the image being denoised."
            ),
            search_aliases=["DescriptiveEdit", *ALIASES, "apply bridge", "reference image", "image edit"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the bridge was trained for."),
                BridgeType.Input("bridge", tooltip="A trained attention bridge. One bridge per model."),
                io.Latent.Input(
                    "reference",
                    tooltip="The source image from VAEEncode: one, one for each sampled image, or several "
                    "to combine. Any size, except with the direction reference_queries and on Chroma and "
                    "SD3.5. A noise mask in it is ignored.",
                ),
                io.Conditioning.Input(
                    "source",
                    optional=True,
                    tooltip="The source description: what the image shows now. Not connected: the sampler's "
                    "negative prompt is used.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the bridge, -10 to 10. 1: as trained. 0: the model is unchanged.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Fraction of sampling after which the bridge starts, 0 to 1. 0: from the start.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Fraction of sampling after which the bridge stops, above start_percent, up to "
                    "1. 1: to the end.",
                ),
                io.Combo.Input(
                    "references",
                    options=list(JOIN),
                    advanced=True,
                    tooltip="How a batch of references is used: one reference for each sampled image, or "
                    "all of them for every image.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Region where the reference acts: 1 = full, 0 = none, soft values in between. "
                    "Same size or aspect ratio as the sampled image. All 0: the model is unchanged.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        bridge: ModelPatcher,
        reference: dict[str, Any],
        strength: float,
        start_percent: float,
        end_percent: float,
        references: str,
        source: list[Any] | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        setup = BridgeSetup(
            bridge,
            samples_of("reference", reference),
            source,
            strength,
            start_percent,
            end_percent,
            mask,
            joined=references == JOIN[1],
        )
        return io.NodeOutput(apply_bridge(model, setup, naming(cls)))


NODES = [DescEditLoadBridge, DescEditNewBridge, DescEditSaveBridge, DescEditApplyBridge]
