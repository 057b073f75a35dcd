"""ComfyUI's real page with the pack in it, as a user clicks through it. The order is a user's."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from host import ROOT
from playwright.sync_api import expect

START = ROOT / "workflows" / "01 Start here.json"
OLD = Path(__file__).parent / "first_start_here.json"
DONE = "type => app.graph.nodes.some(n => n.type === type && app.nodeOutputs[n.id]?.images?.length)"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_template_opens(site: Any) -> None:
    """Protects: the template browser lists the pack's templates; one opens whole, and nothing complains."""
    dialog = site.page.get_by_role("dialog")
    if not dialog.count():
        site.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog.get_by_text("ComfyUI-DescriptiveEdit").first.click()
    site.page.get_by_test_id(f"template-workflow-{START.stem}").click()
    site.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(read(START)["nodes"]))
    assert site.missing() == []
    assert site.errors == []


def test_run_shows_the_picture(site: Any) -> None:
    """Protects: Run makes the edited picture appear in the graph that the template opened."""
    site.set_widget("DescEditUnify", "steps", 2)
    site.page.get_by_test_id("queue-button").click()
    site.page.wait_for_function(DONE, arg="SaveImage", timeout=120_000)
    site.look_at("SaveImage")
    assert site.errors == []


def test_saved_picture_opens_the_graph(site: Any) -> None:
    """Protects: a picture that SaveImage wrote, dropped on the page, brings the whole graph back."""
    (saved,) = (site.server.base / "output").rglob("*.png")
    site.page.evaluate("app.graph.clear()")
    site.page.evaluate(
        """async data => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0))
            await app.handleFile(new File([bytes], 'edited.png', {type: 'image/png'}))
        }""",
        base64.b64encode(saved.read_bytes()).decode(),
    )
    site.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(read(START)["nodes"]))
    assert site.missing() == []


def test_help_panel(site: Any) -> None:
    """Protects: the help button of a node shows the pack's page, with its picture."""
    site.load(read(START))
    site.look_at("DescEditUnify")
    site.page.get_by_test_id("info-button").click()
    panel = site.page.locator(".node-help-content")
    panel.get_by_text("Common mistakes").wait_for()
    assert "UnifyEdit" in panel.inner_text()
    site.page.wait_for_function(
        "[...document.querySelectorAll('.node-help-content img')].some(image => image.naturalWidth > 0)"
    )


@pytest.mark.parametrize(
    ("paper", "first", "second"),
    [
        ("UnifyEdit", "UnifyEdit", "UnifyEdit Sampler"),
        ("DescriptiveEdit", "Apply Attention Bridge", "Dual Guider (image and text)"),
    ],
    ids=["UnifyEdit", "DescriptiveEdit"],
)
def test_search_by_paper(site: Any, paper: str, first: str, second: str) -> None:
    """Protects: whoever types a paper's name into the node search finds the node that does it at the top."""
    site.page.keyboard.press("Escape")
    site.page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    site.page.keyboard.type(paper)
    results = site.page.get_by_test_id("result-item")
    expect(results.first).to_contain_text(first, timeout=60_000)
    expect(results.nth(1)).to_contain_text(second)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        *[(typed, "UnifyEdit") for typed in ("p2p", "ip2p", "masactrl", "image edit", "edit image")],
        *[(typed, "Invert Image (DDIM)") for typed in ("null text", "rf inversion", "unsampler")],
        ("before after", "Contact Sheet (labelled)"),
        ("crop and stitch", "Crop for Edit"),
    ],
)
def test_search_by_other_words(site: Any, typed: str, found: str) -> None:
    """Protects: the words that the field uses lead to our nodes, within the first results."""
    site.page.keyboard.press("Escape")
    site.page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    site.page.keyboard.type(typed)
    results = site.page.get_by_test_id("result-item")
    expect(results.filter(has_text=found).first).to_be_visible(timeout=60_000)


def test_every_node_is_drawn(site: Any) -> None:
    """Protects: every node of ours draws on the page with its title, its inputs, their defaults and room."""
    ours = {key: info for key, info in site.server.object_info().items() if key.startswith("DescEdit")}
    for node_type, info in ours.items():
        shown = site.show_alone(node_type)
        assert shown["title"] == info["display_name"]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        # An input that grows is shown as its own name, a dot, and the name of the part.
        assert {name.partition(".")[0] for name in shown["inputs"]} == inputs.keys(), node_type
        defaults = {
            name: options[0]["default"] for name, (_, *options) in inputs.items() if "default" in options[0]
        }
        assert {name: shown["widgets"].get(name) for name in defaults} == defaults, node_type
        assert shown["bottom"] <= shown["height"], node_type
    assert site.errors == []


def test_wrong_input_marks_the_node(site: Any) -> None:
    """Protects: a wrong input turns the node that refuses it red, with the pack's own message."""
    site.load(read(START))
    site.set_widget("DescEditDescribe", "words", "zebra")
    site.set_widget("DescEditUnify", "steps", 2)
    site.page.get_by_test_id("queue-button").click()
    site.page.wait_for_function("app.lastExecutionError", timeout=120_000)
    failed = site.page.evaluate("app.lastExecutionError")
    assert failed["node_type"] == "DescEditDescribe"
    assert failed["exception_message"].startswith("Describe Edit: words has 'zebra', which is not in")
    site.look_at("DescEditDescribe")
    site.page.get_by_role("button", name="View details").click()
    site.page.get_by_text("words has 'zebra'").first.wait_for()


def test_old_workflow_loads(site: Any) -> None:
    """Protects: a graph saved with the pack's first version opens whole, with its values and wires."""
    old = read(OLD)
    site.load(old)
    site.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(old["nodes"]))
    assert site.missing() == []
    wires = site.page.evaluate(
        "app.graph.nodes.flatMap(n => n.inputs ?? []).filter(i => i.link != null).length"
    )
    assert wires == len(old["links"])
    (balance,) = [node for node in old["nodes"] if node["type"] == "DescEditAdaptiveScheduler"]
    shown = site.page.evaluate(
        "app.graph.nodes.find(n => n.type === 'DescEditAdaptiveScheduler').widgets.map(w => w.value)"
    )
    assert shown[: len(balance["widgets_values"])] == balance["widgets_values"]


@pytest.mark.parametrize("file", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda file: file.stem)
def test_blueprint_loads(site: Any, file: Path) -> None:
    """Protects: a blueprint opens as one node whose inside the page knows whole."""
    site.load(read(file))
    inside = site.page.evaluate("app.graph.nodes.map(n => (n.subgraph?.nodes ?? []).map(m => m.type))")
    (types,) = inside
    assert sorted(types) == sorted(n["type"] for n in read(file)["definitions"]["subgraphs"][0]["nodes"])
    unknown = site.page.evaluate("types => types.filter(t => !LiteGraph.registered_node_types[t])", types)
    assert unknown == []


def test_chinese(chinese: Any) -> None:
    """Protects: with the page in Chinese, names on the nodes and the help page are Chinese."""
    page, names = chinese.page, json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    title = names["DescEditDescribe"]["display_name"]
    chinese.load(read(START))
    chinese.look_at("DescEditDescribe")
    assert page.evaluate("LiteGraph.registered_node_types.DescEditDescribe.title") == title
    menu = json.loads((ROOT / "locales/zh/main.json").read_text(encoding="utf-8"))["nodeCategories"]
    category = page.evaluate("LiteGraph.registered_node_types.DescEditDescribe.category")
    assert category == f"{menu['descriptive edit']}/{menu['unifyedit']}"
    shown = page.evaluate(
        "app.graph.nodes.find(n => n.type === 'DescEditDescribe').inputs.map(i => i.localized_name)"
    )
    assert names["DescEditDescribe"]["inputs"]["source_description"]["name"] in shown
    page.get_by_test_id("info-button").click()
    page.locator(".node-help-content").get_by_text("常见错误").wait_for()
