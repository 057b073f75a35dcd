"""The example workflows: the page's format and the API's agree, and the server offers them as templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from host import ROOT, Prompt
from PIL import Image

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}


def input_specs(info: dict[str, Any]) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Of each input of a node, in the page's order: whether it is a widget, and its options."""
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            settings = options[0] if options else {}
            widget = (isinstance(kind, list) or kind in WIDGETS) and not settings.get("forceInput")
            found[name] = (widget, settings)
    return found


def widget_values(node: dict[str, Any], specs: dict[str, tuple[bool, dict[str, Any]]]) -> dict[str, Any]:
    """A saved node's widget values by name; the page stores a second value for seeds and for uploads."""
    stored, found = list(node["widgets_values"]), {}
    for name, (widget, settings) in specs.items():
        if widget:
            found[name] = stored.pop(0)
            if settings.get("control_after_generate") or settings.get("image_upload"):
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
        assert {item["name"] for item in node["inputs"]} <= set(specs), node["type"]
        for slot, item in enumerate(node["inputs"]):
            if item["link"] is None:
                continue
            number, origin, output, target, target_slot, kind = links[item["link"]]
            assert (target, target_slot) == (node["id"], slot)
            assert object_info[nodes[origin]["type"]]["output"][output] == kind
            assert number in nodes[origin]["outputs"][output]["links"]
            inputs[item["name"]] = [str(origin), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.fixture(scope="module")
def object_info(live_server: Any) -> dict[str, Any]:
    """Every node as the server describes it to the page."""
    return live_server.object_info()


def test_there_are_workflows() -> None:
    """Protects: the tests below from passing because they found nothing."""
    assert WORKFLOWS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_page_and_api_agree(file: Path, object_info: dict[str, Any]) -> None:
    """Protects: the template a user opens is the graph that the tests run, and fits the nodes as they are."""
    api = json.loads((file.parent / "api" / file.name).read_text(encoding="utf-8"))
    for node in api.values():
        del node["_meta"]
    assert to_prompt(json.loads(file.read_text(encoding="utf-8")), object_info) == api


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
        assert min(picture.size) >= 128
