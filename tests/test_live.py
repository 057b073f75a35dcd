"""The pack in a running server, driven through the API as the page drives it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import ROOT, Host, NodeError, Prompt, comfyui_path
from PIL import Image

START = ROOT / "workflows" / "api" / "01 Start here.json"
PARTS = ROOT / "lab" / "benchmark" / "tiny" / "unify.api.json"
STEPS = 2


@pytest.fixture
def prompt() -> Prompt:
    """The shipped workflow, with few steps."""
    shipped = json.loads(START.read_text(encoding="utf-8"))
    node(shipped, "DescEditUnify")["steps"] = STEPS
    return shipped


def find(prompt: Prompt, class_type: str) -> str:
    """The id of the only node of a type."""
    (found,) = [key for key, value in prompt.items() if value["class_type"] == class_type]
    return found


def node(prompt: Prompt, class_type: str) -> dict[str, Any]:
    """The inputs of the only node of a type."""
    return prompt[find(prompt, class_type)]["inputs"]


def pictures(server: Any, prompt: Prompt) -> dict[str, np.ndarray]:
    """Run a prompt; its pictures by the title of the node that shows or saves them."""
    found = {}
    for key, output in server.run(prompt).items():
        for item in output.get("images", []):
            with Image.open(io.BytesIO(server.image(item))) as picture:
                found[prompt[key]["_meta"]["title"]] = np.asarray(picture.convert("RGB"), np.float32) / 255
    return found


def test_server_has_our_nodes(object_info: dict[str, Any], host: Host) -> None:
    """Protects: a freshly started server offers every node of the pack to the page."""
    ours = {
        key
        for key, value in object_info.items()
        if value["python_module"] == "custom_nodes.ComfyUI-DescriptiveEdit"
    }
    assert ours == set(host.node_ids())


def test_shipped_workflow_runs(live_server: Any, prompt: Prompt) -> None:
    """Protects: the shipped workflow runs on the server, shows its progress, and changes the picture."""
    steps: dict[str, int] = {}

    def progress(name: str, step: int, last: int) -> None:
        steps[name] = max(step, steps.get(name, 0))

    live_server.run(prompt, progress)
    assert steps["DescEditUnify"] == STEPS
    found = pictures(live_server, prompt)
    assert found["Edited"].shape == found["Draw Tiny Scene"].shape == (128, 128, 3)
    assert np.isfinite(found["Edited"]).all()
    assert np.abs(found["Edited"] - found["Draw Tiny Scene"]).max() > 0.1


def test_shipped_workflow_edits(live_server: Any, host: Host) -> None:
    """Protects: as shipped, the workflow makes the edit it describes and keeps the rest of the picture."""
    shipped = json.loads(START.read_text(encoding="utf-8"))
    scene = node(shipped, "DescEditTinyScene")
    found = pictures(live_server, shipped)
    scenes = host.pack_module("models.tiny_studio.scenes")
    pair = scenes.sample_edit(scene["edit_type"], scene["seed"], scene["wording"], held=True)
    (read,) = host.pack_module("lab.tiny_studio.attribute_classifier").load().read(found["Edited"][None])
    assert {name: read.get(name) for name in pair.target.values} == pair.target.values
    keep = pair.mask() <= 0
    assert np.mean((found["Edited"][keep] - found["Draw Tiny Scene"][keep]) ** 2) < 0.01


def test_same_queue_same_picture(live_server: Any, prompt: Prompt) -> None:
    """Protects: the same workflow gives the same bits after another one ran in between."""
    first = pictures(live_server, prompt)["Edited"]
    other = copy.deepcopy(prompt)
    node(other, "DescEditTinyScene")["seed"] += 1
    assert not np.array_equal(pictures(live_server, other)["Edited"], first)
    assert np.array_equal(pictures(live_server, prompt)["Edited"], first)


def empty_source(prompt: Prompt) -> None:
    node(prompt, "DescEditDescribe")["source_text"] = " "


def equal_descriptions(prompt: Prompt) -> None:
    texts = {"source_description": "a red circle", "edit_description": "a red circle"}
    node(prompt, "DescEditDescribe").update(texts)


def missing_word(prompt: Prompt) -> None:
    node(prompt, "DescEditDescribe")["words"] = "elephant"


def long_description(prompt: Prompt) -> None:
    node(prompt, "DescEditDescribe")["edit_description"] = "a very " * 60 + "green circle"


def empty_mask(prompt: Prompt) -> None:
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 128, "height": 128}}
    node(prompt, "DescEditUnify")["mask"] = ["mask", 0]


def wide_mask(prompt: Prompt) -> None:
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 128, "height": 64}}
    node(prompt, "DescEditUnify")["mask"] = ["mask", 0]


def nothing_to_sample(prompt: Prompt) -> None:
    node(prompt, "DescEditUnify")["denoise"] = 0.0


def as_parts(prompt: Prompt) -> None:
    """Make it a graph of UnifyEdit's parts, the benchmark's, on a drawn scene."""
    prompt.clear()
    prompt.update(json.loads(PARTS.read_text(encoding="utf-8")))
    scene = {"edit_type": "colour", "seed": 8, "wording": "simple"}
    prompt[find(prompt, "LoadImage")] = {"class_type": "DescEditTinyScene", "inputs": scene}
    del prompt[find(prompt, "LoadImageMask")]
    node(prompt, "DescEditUnifySampler")["mask"] = [find(prompt, "DescEditTinyScene"), 2]
    node(prompt, "BasicScheduler")["steps"] = STEPS


def wrong_mask_of_the_sampler(prompt: Prompt) -> None:
    as_parts(prompt)
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 128, "height": 64}}
    node(prompt, "DescEditUnifySampler")["mask"] = ["mask", 0]


def other_steps(prompt: Prompt) -> None:
    as_parts(prompt)
    model = node(prompt, "CFGGuider")["model"]
    settings = {"model": model, "scheduler": "normal", "steps": STEPS + 1, "denoise": 1.0}
    prompt["sigmas"] = {"class_type": "BasicScheduler", "inputs": settings}
    node(prompt, "SamplerCustomAdvanced")["sigmas"] = ["sigmas", 0]


def other_size(prompt: Prompt) -> None:
    as_parts(prompt)
    size = {"width": 64, "height": 64, "batch_size": 1}
    prompt["latent"] = {"class_type": "EmptyLatentImage", "inputs": size}
    node(prompt, "SamplerCustomAdvanced")["latent_image"] = ["latent", 0]


def other_model(prompt: Prompt) -> None:
    as_parts(prompt)
    prompt["other"] = {"class_type": "DescEditTinyStudio", "inputs": {}}
    prompt["changed"] = {
        "class_type": "ModelMergeSimple",
        "inputs": {"model1": ["other", 0], "model2": ["other", 0], "ratio": 0.5},
    }
    node(prompt, "CFGGuider")["model"] = ["changed", 0]


def unreadable_picture(prompt: Prompt) -> None:
    prompt["picture"] = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    node(prompt, "VAEEncode")["pixels"] = ["picture", 0]


def missing_picture(prompt: Prompt) -> None:
    prompt["picture"] = {"class_type": "LoadImage", "inputs": {"image": "nowhere.png"}}
    node(prompt, "VAEEncode")["pixels"] = ["picture", 0]


BAD = {
    empty_source: "DescEditDescribe",
    equal_descriptions: "DescEditDescribe",
    missing_word: "DescEditDescribe",
    long_description: "DescEditDescribe",
    empty_mask: "DescEditUnify",
    wide_mask: "DescEditUnify",
    nothing_to_sample: "DescEditUnify",
    wrong_mask_of_the_sampler: "DescEditUnifySampler",
    other_steps: "UnifyEdit Sampler: ",
    other_size: "UnifyEdit Sampler: ",
    other_model: "UnifyEdit Sampler: ",
    unreadable_picture: "LoadImage",
    missing_picture: "LoadImage",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_a_node_error(live_server: Any, prompt: Prompt, spoil: Any) -> None:
    """Protects: bad input is an error that names the node, and the server runs the next prompt."""
    (live_server.base / "input" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    broken = copy.deepcopy(prompt)
    spoil(broken)
    with pytest.raises(NodeError) as failure:
        live_server.run(broken)
    assert BAD[spoil] in str(failure.value)
    assert "Edited" in pictures(live_server, prompt)


DIALS = (
    *("network", "edit_type", "seed", "wording"),
    *("steps", "cfg", "scheduler", "denoise", "structure", "words"),
)


def choices(info: dict[str, Any], prompt: Prompt) -> dict[str, tuple[str, list[Any]]]:
    """By dial of our nodes in a graph, its node's id and each choice of a list or both ends of a number."""
    found = {}
    for key, used in prompt.items():
        if not used["class_type"].startswith("DescEdit"):
            continue
        inputs = info[used["class_type"]]["input"]
        for name, (kind, *rest) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            if kind == "COMBO":
                found[name] = key, list(rest[0]["options"])
            elif kind in ("INT", "FLOAT"):
                found[name] = key, [rest[0]["min"], rest[0]["max"]]
    return found


@pytest.mark.parametrize("dial", DIALS)
def test_every_dial_of_start_here(
    live_server: Any, object_info: dict[str, Any], prompt: Prompt, dial: str
) -> None:
    """Protects: whatever a user chooses in the first template gives a picture, and no dial is dead."""
    node(prompt, "DescEditUnify")["steps"] = 2
    found = choices(object_info, prompt)
    assert set(found) == set(DIALS)
    key, values = found[dial]
    if dial == "steps":
        values = [1, 2]  # the upper end is the next test
    made = set()
    for value in values:
        prompt[key]["inputs"][dial] = value
        picture = pictures(live_server, prompt)["Edited"]
        assert picture.shape == (128, 128, 3)
        assert picture.std() > 0.02, value
        made.add(picture.tobytes())
    assert len(made) > 1


def test_the_most_steps(live_server: Any, prompt: Prompt) -> None:
    """Protects: the upper end of steps begins to run and can be cancelled; a schedule that has not so many
    sigmas says so by its name, in one line.
    """
    node(prompt, "DescEditUnify")["steps"] = 10000

    def cancel(name: str, step: int, _: int) -> None:
        if name == "DescEditUnify" and step == 1:
            urllib.request.urlopen(f"{live_server.address}/interrupt", b"").close()

    with pytest.raises(NodeError, match="interrupted"):
        live_server.run(prompt, cancel)
    node(prompt, "DescEditUnify")["scheduler"] = "simple"
    with pytest.raises(NodeError, match="the scheduler simple cannot make steps 10000 at") as refused:
        live_server.run(prompt)
    assert len(refused.value.message) < 250


def test_dev_edit(tmp_path: Path) -> None:
    """Protects: `dev.py edit` edits the sample scenes, writes images and metrics, and stops its server."""
    command = [sys.executable, str(ROOT / "dev.py"), "edit", "--out", "pictures", "--json", "figures.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(not isinstance(value, (dict, list)) for value in figures.values())
    assert figures["source_psnr_outside_mask_db"] > 20
    assert 0.5 <= figures["edit_success"] <= 1
    for name in ("colour_source", "colour_edited", "overview"):
        assert figures[name] in done.stdout
        with Image.open(tmp_path / figures[name]) as picture:
            picture.load()


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_dev_edit_own_picture(
    live_server: Any,
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    masked: bool,
) -> None:
    """Protects: `dev.py edit --image` takes a picture of any size, two descriptions, and a mask or none; it
    shows progress by the node's title, and says nothing of a mask where none leaves something to keep.
    """
    Image.new("RGB", (200, 150), "red").save(tmp_path / "my picture.png")
    Image.new("L", (200, 150), 255).save(tmp_path / "mask.png")
    edit = host.pack_module("lab.edit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_path()))
    monkeypatch.setattr(edit, "Server", lambda *_: contextlib.nullcontext(live_server))
    texts = ["--source", "a red circle", "--edit", "a blue circle"]
    mask = ["--mask", "mask.png"] if masked else []
    assert edit.main(["--image", "my picture.png", *texts, *mask]) == 0
    said = capsys.readouterr().out
    assert "UnifyEdit 25/25" in said
    assert "mask" not in said  # a mask of the whole image has no outside
    with Image.open(tmp_path / "output" / "edit" / "picture-edited.png") as picture:
        assert picture.size == (128, 128)
