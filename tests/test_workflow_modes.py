"""The shipped graphs in every memory mode: each runs whole, and gives what it gives with resident weights."""

from __future__ import annotations

import json
from typing import Any

import memory_modes
import numpy as np
import pytest
import torch
from host import ROOT, Host, Prompt
from PIL import Image
from test_workflows import IP_ADAPTER, WORKFLOWS, write_files

SIZE = 64
# The Tiny Studio in a checkpoint's place, and a text in the place of what a language model says.
STANDINS: dict[str, tuple[str, dict[str, Any]]] = {
    "CheckpointLoaderSimple": ("DescEditTinyStudio", {}),
    "TextGenerate": ("PrimitiveStringMultiline", {"value": "a green square on a white background"}),
}
SMALL: dict[str, dict[str, Any]] = {
    "DescEditCrop": {"side": SIZE},
    "BasicScheduler": {"steps": 2},
    "KSampler": {"steps": 2},
    "DescEditUnify": {"steps": 2},
    "DescEditGuidanceGrid": {"steps": 2, "image_guidance": "1.5", "text_guidance": "3"},
    "DescEditEditPairs": {"resolution": SIZE},
    "DescEditTinyPairs": {"pairs": 2},
    "DescEditNewBridge": {"rank": 4},
    "DescEditLoadBridge": {"bridge_name": "sd15_bridge_00001_.safetensors"},
    "DescEditTrainBridge": {"steps": 2, "learning_rate": 1e-2},
}
# In no shipped graph: run by `test_other_nodes`, or without a network.
OTHERS = {"DescEditDualGuider", "DescEditFindTokens"}
NO_NETWORK = {"DescEditGuidanceSchedule", "DescEditSavePair"}
WITH_FILES = "10 Bridge with ControlNet"
# Of other packs, or of models that no test can have.
FOREIGN = {IP_ADAPTER, "06 Make edit pairs"}


def graph(name: str) -> Prompt:
    """A shipped graph, small enough for a test."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for key, node in list(prompt.items()):
        if node["class_type"] in STANDINS:
            node["class_type"], node["inputs"] = STANDINS[node["class_type"]]
        node["inputs"] |= SMALL.get(node["class_type"], {})
        if node["class_type"] == "CLIPLoader":
            del prompt[key]
    return prompt


@pytest.fixture(scope="module")
def files(host: Host) -> None:
    """What the graphs read."""
    with memory_modes.resident():
        write_files(host, {node["class_type"]: node for node in graph(WITH_FILES).values()})
    folder = host.base / "input" / "edit_pairs"
    folder.mkdir(exist_ok=True)
    for role in ("source", "edit"):
        noise = np.random.default_rng(len(role)).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"one_{role}.png")
    (folder / "one.json").write_text(json.dumps({"source": "a red circle", "edit": "a green circle"}))


def results(host: Host, prompt: Prompt) -> list[torch.Tensor]:
    """Pictures, and weights that were learned."""
    outputs = host.run_graph(prompt)
    found = [outputs[key][0] for key, node in prompt.items() if node["class_type"] == "VAEDecode"]
    for key, node in prompt.items():
        if node["class_type"] == "DescEditTrainBridge":
            found += outputs[key][0].model.state_dict().values()
        if node["class_type"] == "DescEditGuidanceGrid":
            found.append(outputs[key][0])
    return found


@pytest.mark.parametrize("name", [file.stem for file in WORKFLOWS if file.stem not in FOREIGN])
def test_graphs(host: Host, files: None, name: str) -> None:
    """Protects: each graph, whichever of our nodes it holds, works however the host keeps weights."""
    found = {}
    for mode, context in memory_modes.MODES.items():
        with context():
            found[mode] = results(host, graph(name))
    assert found["resident"]
    for tensors in found.values():
        torch.testing.assert_close(tensors, found["resident"], rtol=1e-5, atol=1e-5, check_device=False)


def other_nodes(host: Host) -> list[torch.Tensor]:
    """What the nodes that no shipped graph holds give: a sampled image."""
    model, clip, vae, bridge = host.execute("DescEditTinyStudio")
    scene, *_ = host.execute("DescEditTinyScene", seed=8)
    (latent,) = host.execute("VAEEncode", pixels=scene, vae=vae)
    texts = {"source_description": "a red circle", "edit_description": "a blue circle"}
    source, edit, tokens, _ = host.execute("DescEditDescribe", clip=clip, **texts)
    assert host.execute("DescEditFindTokens", clip=clip, **texts)[0] == tokens
    (bridged,) = host.execute("DescEditApplyBridge", model=model, bridge=bridge, reference=latent)
    (guider,) = host.execute("DescEditDualGuider", model=bridged, edit=edit, unconditional=source)
    (sigmas,) = host.execute("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
    (noise,) = host.execute("RandomNoise", noise_seed=1)
    (sampler,) = host.execute("KSamplerSelect", sampler_name="euler")
    parts = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    sampled, _ = host.execute("SamplerCustomAdvanced", **parts)
    return [*host.execute("VAEDecode", samples=sampled, vae=vae)]


def test_other_nodes(host: Host) -> None:
    """Protects: nodes that no shipped graph holds work however the host keeps weights."""
    found = {}
    for mode, context in memory_modes.MODES.items():
        with context():
            found[mode] = other_nodes(host)
    for tensors in found.values():
        torch.testing.assert_close(tensors, found["resident"], rtol=1e-4, atol=1e-4)


def test_every_node_is_run(host: Host) -> None:
    """Protects: a new node cannot stay out of these modes unnoticed."""
    prompts = [graph(file.stem) for file in WORKFLOWS if file.stem not in FOREIGN]
    run = {node["class_type"] for prompt in prompts for node in prompt.values()}
    assert set(host.node_ids()) - run == OTHERS | NO_NETWORK


def test_pairs_of_a_folder(host: Host) -> None:
    """Protects: the template that makes pairs writes one for each photo of the folder, in the photo's shape,
    with both texts; the Tiny Studio stands in for its models, which no test can have.
    """
    prompt = json.loads((ROOT / "workflows" / "api" / "06 Make edit pairs.json").read_text(encoding="utf-8"))
    (studio,) = [key for key, node in prompt.items() if node["class_type"] == "UNETLoader"]
    slots = {"CLIPLoader": 1, "VAELoader": 2}
    loaders = {key: slots[node["class_type"]] for key, node in prompt.items() if node["class_type"] in slots}
    prompt[studio] = {"class_type": "DescEditTinyStudio", "inputs": {}}
    texts = iter(("a red circle", "a red circle in winter"))
    for key, node in list(prompt.items()):
        if node["class_type"] == "TextGenerate":
            node["class_type"], node["inputs"] = "PrimitiveStringMultiline", {"value": next(texts)}
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][name] = [studio, loaders[value[0]]]
        if node["class_type"] == "ImageScaleToTotalPixels":
            node["inputs"]["megapixels"] = 0.01
        if node["class_type"] == "DescEditSavePair":
            node["inputs"]["folder"] = "made_pairs"
        if key in loaders:
            del prompt[key]
    photos = host.base / "input" / "edit_sources"
    photos.mkdir()
    for index, shape in enumerate(((100, 200, 3), (200, 100, 3))):
        noise = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
        Image.fromarray(noise).save(photos / f"{index}.png")
    host.run_graph(prompt)
    made = host.base / "input" / "made_pairs"
    pairs = sorted(made.glob("*.json"))
    shapes = set()
    for pair in pairs:
        assert json.loads(pair.read_text("utf-8")) == {
            "source": "a red circle",
            "edit": "a red circle in winter",
        }
        with (
            Image.open(pair.with_name(f"{pair.stem}_source.png")) as source,
            Image.open(pair.with_name(f"{pair.stem}_edit.png")) as edited,
        ):
            assert source.size == edited.size
            assert np.abs(np.asarray(source, np.float32) - np.asarray(edited, np.float32)).mean() > 5
            shapes.add(source.width > source.height)
    assert len(pairs) == 2
    assert shapes == {True, False}
