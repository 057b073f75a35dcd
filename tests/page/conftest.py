"""Headless Chromium on the real page of a real server; every test leaves its screenshot in output/page."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from host import ROOT, live_server
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

SCREENSHOTS = ROOT / "output" / "page"
FLAGS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
# Few frames a second: the page's drawing must not starve the server on a small machine.
SETTINGS = {"LiteGraph.Canvas.MaximumFps": 2, "Comfy.Minimap.Visible": False}
# What a fresh ComfyUI logs by itself: files that a user may have and has not, and its own order of start.
HOST_NOISE = re.compile(r"/(api/userdata|user\.css)|graph accessed before initialization")


class Site:
    """The page of one server, in one language, with what its console said that the host's own does not."""

    def __init__(self, browser: Browser, running: Any) -> None:
        self.server = running
        self.errors: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 1500, "height": 950})
        self.page.set_default_timeout(120_000)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _hear(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not HOST_NOISE.search(text):
            self.errors.append(text)

    def settings(self, **values: Any) -> None:
        body = json.dumps({**SETTINGS, **values}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(
            urllib.request.Request(f"{self.server.address}/settings", body, headers)
        ).close()

    def open(self) -> None:
        """Load the page and wait until it knows the server's nodes."""
        self.page.goto(self.server.address, wait_until="commit")
        ready = "window.app?.extensionManager && window.LiteGraph?.registered_node_types.DescEditTinyStudio"
        self.page.wait_for_function(f"!!({ready} && app.extensionManager.workflow?.activeWorkflow)")

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow as the page's own menu does."""
        self.page.keyboard.press("Escape")
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)

    def look_at(self, node_type: str) -> None:
        """Select the only node of a type and bring it into view."""
        self.page.evaluate(
            """type => {
                const node = app.graph.nodes.find(node => node.type === type)
                app.canvas.selectNode(node)
                app.canvas.ds.scale = 0.9
                app.canvas.ds.offset = [300 - node.pos[0], 200 - node.pos[1]]
                app.canvas.setDirty(true, true)
            }""",
            node_type,
        )

    def show_alone(self, node_type: str) -> dict[str, Any]:
        """Put one node of a type on the emptied canvas, wide enough for its title, and keep its picture.

        Returns its title, its inputs' names, its widgets' values, its height and where its widgets end.
        """
        self.page.keyboard.press("Escape")
        shown = self.page.evaluate(
            """type => {
                // Not clear(), which gives the next node the same number, and the page the old one's values.
                [...app.graph.nodes, ...app.graph.groups].forEach(item => app.graph.remove(item))
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                node.setSize([Math.max(node.size[0], 220), node.size[1]])
                app.canvas.deselectAll()
                app.canvas.ds.scale = 1
                app.canvas.ds.offset = [300 - node.pos[0], 150 - node.pos[1]]
                app.canvas.draw(true, true)
                const {left, top} = app.canvas.canvas.getBoundingClientRect()
                const [x, y, width, height] = node.boundingRect
                const widgets = node.widgets ?? []
                return {
                    title: node.title,
                    inputs: node.inputs.map(input => input.name),
                    widgets: Object.fromEntries(widgets.map(widget => [widget.name, widget.value])),
                    texts: widgets.filter(widget => widget.element).length,
                    bottom: Math.max(0, ...widgets.map(widget => widget.y + widget.computedHeight)),
                    height: node.size[1],
                    clip: {x: left + x + 300 - node.pos[0], y: top + y + 150 - node.pos[1], width, height},
                }
            }""",
            node_type,
        )
        # Texts of several lines are laid over the canvas, by a drawing that comes after they were made.
        self.page.wait_for_function(
            """([count, {x, y, width, height}]) => {
                app.canvas.draw(true, true)
                const boxes = [...document.querySelectorAll('textarea')].map(t => t.getBoundingClientRect())
                const across = box => box.left > x && box.right < x + width
                const down = box => box.top > y && box.bottom < y + height
                return boxes.length === count && boxes.every(box => across(box) && down(box))
            }""",
            arg=[shown.pop("texts"), shown["clip"]],
        )
        picture = SCREENSHOTS / "nodes" / f"{node_type}.jpg"
        self.page.screenshot(path=picture, type="jpeg", quality=80, clip=shown.pop("clip"), timeout=60_000)
        return shown

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        self.page.evaluate(
            """([type, name, value]) => {
                const node = app.graph.nodes.find(node => node.type === type)
                node.widgets.find(widget => widget.name === name).value = value
            }""",
            [node_type, name, value],
        )

    def missing(self) -> list[str]:
        """The types of nodes in the open graph that the page does not know."""
        return self.page.evaluate(
            "app.graph.nodes.filter(n => !n.isVirtualNode && !LiteGraph.registered_node_types[n.type]"
            " && !n.subgraph).map(n => n.type)"
        )

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", timeout=60_000)


@pytest.fixture(scope="session")
def screenshots() -> None:
    """An empty folder for those of all modules."""
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    SCREENSHOTS.mkdir(parents=True)


# For one module: until it ends, Playwright holds this thread in an event loop that no other test can share.
@pytest.fixture(scope="module")
def browser(screenshots: None) -> Iterator[Browser]:
    """Debian's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise RuntimeError("no Chromium: `apt-get install chromium`, or run the tests without --page")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=False)
        yield running
        running.close()


@pytest.fixture(scope="module")
def site(browser: Browser) -> Iterator[Site]:
    """The page in English, on a server of its own."""
    with live_server() as running:
        bridge = running.base / "models" / "attention_bridges" / "tiny_studio.safetensors"
        bridge.parent.mkdir()
        shutil.copy(ROOT / "models" / "tiny_studio" / "bridge.safetensors", bridge)
        shown = Site(browser, running)
        shown.settings()
        shown.open()
        yield shown


@pytest.fixture
def chinese(browser: Browser, site: Site) -> Iterator[Site]:
    """The page of the same server in Chinese, as someone else opens it."""
    site.settings(**{"Comfy.Locale": "zh"})
    shown = Site(browser, site.server)
    shown.open()
    yield shown
    site.settings(**{"Comfy.Locale": "en"})
    shown.page.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    """Keep what the page showed at the end of a test, whether it passed or not."""
    try:
        return (yield)
    finally:
        name = re.sub(r"\W+", "-", item.name).strip("-")
        # What the test names, and not the other pages that this one was made from.
        for argument in inspect.signature(item.function).parameters:
            if isinstance(shown := item.funcargs[argument], Site):
                shown.screenshot(name)
