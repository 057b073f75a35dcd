"""Every template on ComfyUI's real page, in both of its renderers, opened from the template browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import ROOT
from playwright.sync_api import Browser

TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
SMALLEST = 0.6  # below about this zoom the page draws no text
QUICK = {
    "DescEditGuidanceGrid": ("steps", 1),
    "BasicScheduler": ("steps", 2),
    "DescEditTrainBridge": ("steps", 2),
}
BOXES = """app.graph.nodes.map(n => {
    const [x, y, width, height] = n.boundingRect
    return {type: n.type, left: x, top: y, right: x + width, bottom: y + height}
})"""


@pytest.fixture(scope="module", params=[False, True], ids=["default page", "Nodes 2.0"])
def shown(request: pytest.FixtureRequest, browser: Browser, site: Any) -> Iterator[Any]:
    """The page in one of its two renderers."""
    site.settings(**{"Comfy.VueNodes.Enabled": request.param})
    page = type(site)(browser, site.server)
    page.open()
    yield page
    page.page.close()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def api(file: Path) -> dict[str, Any]:
    """The template as the API takes it."""
    return read(file.parent / "api" / file.name)


NO_DOWNLOAD = [
    file for file in TEMPLATES if "DescEditTinyStudio" in {node["class_type"] for node in api(file).values()}
]


def files_of(file: Path) -> list[str]:
    """The models that a template offers for download."""
    nodes = read(file)["nodes"]
    return [model["name"] for node in nodes for model in node["properties"].get("models", [])]


def open_template(shown: Any, name: str) -> None:
    """Open a template as a user does, and wait until the page has fitted it and sizes stay."""
    page = shown.page
    page.keyboard.press("Escape")
    dialog = page.get_by_role("dialog")
    if not dialog.count():
        page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog.get_by_text("ComfyUI-DescriptiveEdit").first.click()
    page.get_by_test_id(f"template-workflow-{name}").click()
    kinds = sorted(node["type"] for node in read(ROOT / "workflows" / f"{name}.json")["nodes"])
    page.wait_for_function(
        """kinds => {
            if (app.graph.nodes.map(n => n.type).sort().join() !== kinds.join()) return false
            const boxes = app.graph.nodes.map(n => [...n.boundingRect])
            const now = JSON.stringify([...app.canvas.ds.visible_area, boxes])
            const before = window.lastBoxes
            window.lastBoxes = now
            return now === before
        }""",
        arg=kinds,
        polling=1000,
    )


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_opens_readable(shown: Any, file: Path) -> None:
    """Protects: at 1500 x 950 a template opens at a zoom that draws its texts, no node or note covers
    another, only another pack's nodes are unknown, files to download are named, and the page queues what the
    tests run.
    """
    open_template(shown, file.stem)
    assert shown.page.evaluate("app.canvas.ds.scale") >= SMALLEST - 0.005
    boxes = shown.page.evaluate(BOXES)
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = other["left"] >= one["right"] or other["right"] <= one["left"]
            apart = apart or other["top"] >= one["bottom"] or other["bottom"] <= one["top"]
            assert apart, f"{one['type']} and {other['type']} overlap"
    foreign = {"IPAdapterUnifiedLoader", "IPAdapter"} if file.stem.startswith("11") else set()
    assert set(shown.missing()) == foreign
    if files_of(file):
        shown.page.get_by_text("is missing").or_(shown.page.get_by_text("errors found")).first.wait_for()
    if not foreign:
        queued = shown.page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
        for key, node in api(file).items():
            found, given = dict(queued[key]["inputs"]), dict(node["inputs"])
            for inputs in (found, given):
                inputs.pop("compare_view", None)  # the slider's own state
            assert found == given, node["class_type"]


@pytest.mark.parametrize("file", NO_DOWNLOAD, ids=lambda file: file.stem)
def test_runs_and_shows(shown: Any, file: Path) -> None:
    """Protects: a template without a download runs at one click, and every node that has something to show
    shows it on itself.
    """
    open_template(shown, file.stem)
    for kind, (name, value) in QUICK.items():
        if any(node["type"] == kind for node in read(file)["nodes"]):
            shown.set_widget(kind, name, value)
    shown.page.get_by_test_id("queue-button").click()
    shows = (
        "SaveImage",
        "PreviewImage",
        "ImageCompare",
        "DescEditTinyScene",
        "DescEditUnify",
        "DescEditFindMask",
    )
    shows += ("DescEditGuidanceGrid", "DescEditCompare", "DescEditAttentionMaps", "DescEditAdaptiveScheduler")
    shown.page.wait_for_function(
        """kinds => app.graph.nodes.filter(n => kinds.includes(n.type)).every(n => {
            const output = app.nodeOutputs[n.id]
            return output?.images?.length || output?.a_images?.length
        })""",
        arg=shows,
        timeout=300_000,
    )
    assert shown.page.evaluate("app.lastExecutionError") is None
    shown.page.wait_for_timeout(2000)  # for the screenshot: pictures are loaded and drawn
