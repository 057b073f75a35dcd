"""What several templates share: files, texts, settings, columns, and parts of their graphs.

Widths and heights leave room for what nodes show after a run, in both of the page's renderers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .graph import Graph, Node, Output, Place

NOTES = Path(__file__).with_name("notes")
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
REPACKAGED = "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
SD15 = ({"name": CHECKPOINT, "url": REPACKAGED + CHECKPOINT, "directory": "checkpoints"},)
SDXL_CHECKPOINT = "sd_xl_base_1.0.safetensors"
SDXL = (
    {
        "name": SDXL_CHECKPOINT,
        "url": f"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{SDXL_CHECKPOINT}",
        "directory": "checkpoints",
    },
)
FLUX_CHECKPOINT = "flux1-dev-fp8.safetensors"
FLUX = (
    {
        "name": FLUX_CHECKPOINT,
        "url": f"https://huggingface.co/Comfy-Org/flux1-dev/resolve/main/{FLUX_CHECKPOINT}",
        "directory": "checkpoints",
    },
)
CANNY = "control_v11p_sd15_canny_fp16.safetensors"
CONTROL = (
    {
        "name": CANNY,
        "url": f"https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/{CANNY}",
        "directory": "controlnet",
    },
)
LORA, BRIDGE = "your_style_sd15.safetensors", "sd15_bridge_00001_.safetensors"
FLUX_BRIDGE = "flux_bridge_00001_.safetensors"
TALKER = "qwen3vl_4b_fp8_scaled.safetensors"
TALKERS = (
    {
        "name": TALKER,
        "url": f"https://huggingface.co/Comfy-Org/Qwen3-VL/resolve/main/text_encoders/{TALKER}",
        "directory": "text_encoders",
    },
)
# The picture that every ComfyUI has, and what it shows.
PICTURE = "example.png"
NOW = "a drawing of a girl in a pink dress on a green hill"
THEN = "a drawing of a girl in a blue dress on a green hill"
# DDIM with 50 steps and cfg 7.5, from pure noise: what Prompt-to-Prompt, MAG-Edit and Guide-and-Rescale use
# on Stable Diffusion 1.x.
LITERATURE: dict[str, Any] = {"steps": 50, "cfg": 7.5, "denoise": 1.0}
# Flux.1 dev's usual ones, in which guidance is part of the conditioning.
DISTILLED: dict[str, Any] = {"steps": 28, "cfg": 1.0, "scheduler": "simple", "denoise": 1.0}
# What the Tiny Studio's study chose.
MEASURED: dict[str, Any] = {"steps": 25, "cfg": 2.0, "denoise": 0.6}
# The same on its network of Flux.1's kind (lab/studies/flow_study.py).
MEASURED_ON_FLUX: dict[str, Any] = {"steps": 15, "cfg": 2.0, "denoise": 0.8, "structure": 0.3}
LEFT, SECOND, THIRD, FOURTH, FIFTH = 0, 310, 660, 1000, 1400
PAIRED: dict[str, Any] = {"steps": 300, "batch": 4, "learning_rate": 1e-3}


def add_notes(graph: Graph, at: Place, size: Place, folded: Place | None = None) -> None:
    """The note in English, and the Chinese one folded up, below it if there is no other place for it.

    size: in Nodes 2.0 a note grows to its text, so the height is at least that.
    """
    number = graph.name[:2]
    english, chinese = ((NOTES / f"{number}.{language}.md").read_text("utf-8") for language in ("en", "zh"))
    graph.note(english, at, size, "Read me first")
    place = folded or (at[0], at[1] + size[1] + 40)
    graph.note(chinese, place, (min(270, size[0]), 60), "先读我（中文）", collapsed=True)


def add_result(graph: Graph, at: Place, before: Output, after: Output, side: float = 380) -> Node:
    """The slider, and beside it what saves the result."""
    graph.add("ImageCompare", at, side, side + 20, "Before and after", image_a=before, image_b=after)
    prefix = "descriptive-edit/edited"
    place = (at[0], at[1] + side + 80)
    return graph.add("SaveImage", place, side, 330, "Edited", images=after, filename_prefix=prefix)


def load_checkpoint(graph: Graph, files: tuple[dict[str, str], ...] = SD15) -> Node:
    """The checkpoint, at the top left. files: it, and where it comes from."""
    name = files[0]["name"]
    return graph.add("CheckpointLoaderSimple", (LEFT, 0), 270, 110, ckpt_name=name, models=files)


def load_studio(graph: Graph, network: str = "UNet") -> Node:
    """The Tiny Studio, at the top left."""
    return graph.add("DescEditTinyStudio", (LEFT, 0), 270, 140, network=network)


def load_photo(graph: Graph, model: Node, **crop: Any) -> tuple[Node, Node, Node]:
    """A photo, its crop and the crop's latent, below the checkpoint. crop: inputs of the crop."""
    photo = graph.add("LoadImage", model.below(), 270, 360, "Your photo", image=PICTURE)
    cut = graph.add("DescEditCrop", photo.below(), 270, 360, image=photo["IMAGE"], mask=photo["MASK"], **crop)
    latent = graph.add("VAEEncode", cut.below(), 270, 60, pixels=cut["image"], vae=model["VAE"])
    return photo, cut, latent


def describe_photo(graph: Graph, at: Place, clip: Output, then: str = THEN, height: float = 440) -> Node:
    """Describe Edit on what ComfyUI's own picture shows. then: the edit description."""
    return graph.add(
        "DescEditDescribe", at, 310, height, clip=clip, source_description=NOW, edit_description=then
    )


def describe_scene(graph: Graph, at: Place, studio: Node, scene: Node) -> Node:
    """Describe Edit on a drawn scene."""
    source, edit = scene["source_description"], scene["edit_description"]
    return graph.add(
        "DescEditDescribe", at, 310, 440, clip=studio["clip"], source_text=source, edit_text=edit
    )


def add_empty(graph: Graph, at: Place, width: float, clip: Output) -> Node:
    """The empty description."""
    return graph.add("CLIPTextEncode", at, width, 100, "Empty description", clip=clip)


def add_style(graph: Graph, at: Place, width: float, base: Node) -> Node:
    """A LoRA on the checkpoint."""
    return graph.add(
        "LoraLoader",
        at,
        width,
        160,
        model=base["MODEL"],
        clip=base["CLIP"],
        lora_name=LORA,
        strength_model=0.8,
        strength_clip=0.8,
    )


def add_edges(graph: Graph, at: Place, width: float, crop: Node) -> tuple[Node, Node]:
    """The photo's edges, and below them the ControlNet that reads them."""
    edges = graph.add("Canny", at, width, 90, image=crop["image"], low_threshold=0.3, high_threshold=0.6)
    net = graph.add("ControlNetLoader", edges.below(), width, 60, control_net_name=CANNY, models=CONTROL)
    return edges, net


def add_control(
    graph: Graph, at: Place, width: float, edges: Node, net: Node, describe: Node, empty: Node, base: Node
) -> Node:
    """The ControlNet on the edit description and the empty one."""
    return graph.add(
        "ControlNetApplyAdvanced",
        at,
        width,
        190,
        positive=describe["edit"],
        negative=empty[0],
        control_net=net[0],
        image=edges[0],
        strength=0.6,
        end_percent=0.6,
        vae=base["VAE"],
    )
