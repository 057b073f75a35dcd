"""The example workflows: the page's format and the API's agree, and the server offers them as templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import comfy.ops
import numpy as np
import pytest
import safetensors.torch
import torch
from bridge_edit import random_bridge
from comfy.cldm.cldm import ControlNet
from host import ROOT, Host, Prompt
from PIL import Image
from test_bridge_formula import attention_lora

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE", "COMFY_DYNAMICCOMBO_V3"}
SEEDS = {"seed", "noise_seed"}
NOTES = {"Note", "MarkdownNote"}
# The one template that needs another pack, and that pack's two nodes as it describes them to the page.
IP_ADAPTER = "11 Bridge with IP-Adapter"
FRACTION = ["FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}]
FOREIGN = {
    "IPAdapterUnifiedLoader": {
        "input": {
            "required": {"model": ["MODEL"], "preset": [["PLUS (high strength)"]]},
            "optional": {"ipadapter": ["IPADAPTER"]},
        },
        "output": ["MODEL", "IPADAPTER"],
    },
    "IPAdapter": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "ipadapter": ["IPADAPTER"],
                "image": ["IMAGE"],
                "weight": ["FLOAT", {"default": 1.0}],
                "start_at": FRACTION,
                "end_at": FRACTION,
                "weight_type": [["standard", "prompt is more important", "style transfer"]],
            },
            "optional": {"attn_mask": ["MASK"]},
        },
        "output": ["MODEL"],
    },
}


def input_specs(info: dict[str, Any]) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Of each input of a node, in the page's order: whether it is a widget, and its options."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            settings = options[0] if options else {}
            widget = (isinstance(kind, list) or kind in WIDGETS) and not settings.get("forceInput")
            found[name] = (widget, {**settings, "slider": kind == "IMAGECOMPARE"})
    return found


def widget_values(node: dict[str, Any], specs: dict[str, tuple[bool, dict[str, Any]]]) -> dict[str, Any]:
    """A saved node's widget values by name; the page stores a second value for seeds and for uploads."""
    stored, found = list(node.get("widgets_values", [])), {}
    for name, (widget, settings) in specs.items():
        if widget:
            found[name] = stored.pop(0)
            if name in SEEDS or settings.get("control_after_generate") or settings.get("image_upload"):
                stored.pop(0)
    assert stored == [], f"{node['type']} has widget values left over"
    return found


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """What the page would queue for a workflow, checked against what the server says of each node."""
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        specs = input_specs(object_info[node["type"]])
        inputs = widget_values(node, specs)
        # An input that grows is saved as its own name, a dot, and the name of the part.
        assert {item["name"].split(".")[0] for item in node["inputs"]} <= set(specs), node["type"]
        sliders = [name for name, (_, settings) in specs.items() if settings.get("slider")]
        inputs |= dict.fromkeys(sliders, "")  # the page sends two empty texts, which the node does not read
        for slot, item in enumerate(node["inputs"]):
            if item["link"] is None:
                continue
            number, origin, output, target, target_slot, kind = links[item["link"]]
            assert (target, target_slot) == (node["id"], slot)
            assert object_info[nodes[origin]["type"]]["output"][output] in (kind, "COMFY_MATCHTYPE_V3")
            assert number in nodes[origin]["outputs"][output]["links"]
            inputs[item["name"]] = [str(origin), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_there_are_workflows() -> None:
    """Protects: the tests below from passing because they found nothing."""
    assert WORKFLOWS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_page_and_api_agree(file: Path, object_info: dict[str, Any]) -> None:
    """Protects: the template a user opens is the graph that the tests run, and fits the nodes as they are."""
    api = json.loads((file.parent / "api" / file.name).read_text(encoding="utf-8"))
    for node in api.values():
        del node["_meta"]
    known = {**object_info, **FOREIGN} if file.stem == IP_ADAPTER else object_info
    assert to_prompt(json.loads(file.read_text(encoding="utf-8")), known) == api


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_layout(file: Path) -> None:
    """Protects: a template that opens tidy, with a note that says where to begin."""
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    assert any(node["type"] in NOTES for node in nodes)
    boxes = [
        (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes
    ]
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = other[0] >= right or other[2] <= left or other[1] >= bottom or other[3] <= top
            assert apart, "two nodes overlap"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_template_is_offered(file: Path, live_server: Any) -> None:
    """Protects: the template browser lists the workflow and shows its picture."""
    folder = "ComfyUI-DescriptiveEdit"
    assert file.stem in live_server.json("/workflow_templates")[folder]
    address = f"/api/workflow_templates/{folder}/{quote(file.stem)}"
    assert json.loads(live_server.get(f"{address}.json")) == json.loads(file.read_text(encoding="utf-8"))
    assert live_server.get(f"{address}.jpg") == file.with_suffix(".jpg").read_bytes()
    with Image.open(file.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (512, 512)


def test_bridge_with_control_net_and_lora(host: Host) -> None:
    """Protects: the graph of a bridge beside a stock ControlNet and LoRA runs whole, from files, and each of
    the three matters to the picture. The files are random, for the Tiny Studio in the checkpoint's place.
    """
    prompt = json.loads((ROOT / "workflows/api/10 Bridge with ControlNet.json").read_text())
    by_class = {node["class_type"]: node for node in prompt.values()}
    by_class["CheckpointLoaderSimple"].update(class_type="DescEditTinyStudio", inputs={})
    by_class["DescEditCrop"]["inputs"]["side"] = 128
    by_class["KSampler"]["inputs"]["steps"] = 2
    write_files(host, by_class)

    def picture() -> torch.Tensor:
        return host.run_graph(prompt)[
            next(key for key, node in prompt.items() if node["class_type"] == "VAEDecode")
        ][0]

    whole = picture()
    assert whole.shape == (1, 128, 128, 3)  # the photo is 160 x 200
    assert torch.equal(picture(), whole)
    for name, inputs in (
        ("DescEditApplyBridge", {"strength": 0.0}),
        ("ControlNetApplyAdvanced", {"strength": 0.0}),
        ("LoraLoader", {"strength_model": 0.0, "strength_clip": 0.0}),
    ):
        before = dict(by_class[name]["inputs"])
        by_class[name]["inputs"].update(inputs)
        assert not torch.allclose(picture(), whole, atol=1e-3), name
        by_class[name]["inputs"] = before


def write_files(host: Host, by_class: dict[str, Any]) -> None:
    """The picture, bridge, LoRA and ControlNet that the graph names, for the Tiny Studio."""
    model = host.execute("DescEditTinyStudio")[0]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)).save(
        host.base / "input" / by_class["LoadImage"]["inputs"]["image"]
    )
    path = host.base / "models/attention_bridges" / by_class["DescEditLoadBridge"]["inputs"]["bridge_name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    host.pack_module("models.bridge_file").save_bridge(random_bridge(host, model).model, path)
    folders = {"LoraLoader": ("loras", "lora_name"), "ControlNetLoader": ("controlnet", "control_net_name")}
    tensors = {"LoraLoader": attention_lora(host, model), "ControlNetLoader": control_net_weights(host)}
    for node, (folder, name) in folders.items():
        path = host.base / "models" / folder / by_class[node]["inputs"][name]
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors[node], path)


def control_net_weights(host: Host) -> dict[str, torch.Tensor]:
    """A cldm ControlNet file of the Tiny Studio's widths, with random weights."""
    unet = host.pack_module("models.tiny_studio.networks").UNET
    names = (
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "transformer_depth",
        "transformer_depth_middle",
    )
    shared = {name: unet[name] for name in (*names, "context_dim", "num_heads")}
    net = ControlNet(
        image_size=32,
        in_channels=4,
        hint_channels=3,
        use_spatial_transformer=True,
        legacy=False,
        operations=comfy.ops.manual_cast,
        **shared,
    )
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, weight in net.state_dict().items():
        fan = weight[0].numel() if weight.ndim > 1 else 100
        state[f"control_model.{name}"] = torch.randn(weight.shape, generator=generator) / fan**0.5
    return state
