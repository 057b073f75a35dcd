"""A graph as the page saves it and as the API takes it, from calls that say only what matters."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..server import Prompt

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE", "COMFY_DYNAMICCOMBO_V3"}
SLIDER = "IMAGECOMPARE"  # a widget of the page whose value is not saved
SEEDS = {"seed", "noise_seed"}
CORE = ("comfy-core", "0.30.0")
PACKS = {"DescEdit": ("descriptive-edit", "0.1.0"), "IPAdapter": ("comfyui_ipadapter_plus", "2.0.0")}
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}
NAMESPACE = uuid.UUID("6c374687-d769-59be-b896-a502b5981666")
INPUTS, OUTPUTS = -10, -20  # the ids of a subgraph's own sockets
# In pixels of the page: a row of sockets, a widget, a text of several lines, the space at the bottom.
ROW, WIDGET, TEXT, REST = 20, 24, 100, 12

Info = Mapping[str, Any]
Place = tuple[float, float]


class Output(NamedTuple):
    """One output of a node, to wire."""

    node: int
    slot: int
    kind: str


class Link(NamedTuple):
    """A wire, in the page's order."""

    number: int
    origin: int
    origin_slot: int
    target: int
    target_slot: int
    kind: str


@dataclass(frozen=True)
class Node:
    """A node in a graph; index it with an output's name or number."""

    saved: dict[str, Any]

    def __getitem__(self, name: str | int) -> Output:
        outputs = self.saved["outputs"]
        slot = name if isinstance(name, int) else [item["name"] for item in outputs].index(name)
        return Output(self.saved["id"], slot, outputs[slot]["type"])

    def below(self, gap: float = 60) -> Place:
        """Where the next node of this column begins."""
        return self.saved["pos"][0], self.saved["pos"][1] + self.saved["size"][1] + gap


@dataclass
class Graph:
    """A graph in the making. info: what the server says of every node."""

    name: str
    info: Info
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    prompt: Prompt = field(default_factory=dict)

    def add(
        self,
        kind: str,
        at: Place,
        width: float = 300,
        height: float | None = None,
        /,
        title: str | None = None,
        fixed: bool = True,
        models: tuple[dict[str, str], ...] = (),
        **inputs: Any,
    ) -> Node:
        """Add a node.

        height: in pixels, by default what sockets and widgets need.
        fixed: whether a seed stays as it is after a run.
        models: files that the page offers for download.
        inputs: an `Output` to wire, or a widget's value; the others keep their defaults.

        Raises ValueError for an input that the node does not have.
        """
        described, number = self.info[kind], len(self.nodes) + 1
        sockets: list[dict[str, Any]] = []
        values: list[Any] = []
        given: dict[str, Any] = {}
        tall = REST
        for name, wire, is_widget, settings in _specs(described, inputs):
            value = inputs.pop(name, None)
            wired = isinstance(value, Output)
            if wire == SLIDER:
                given[name] = ""
                continue
            if wired or not is_widget:
                sockets.append({"name": name, "type": value.kind if wired else wire, "link": None})
            if wired:
                link = Link(len(self.links) + 1, *value[:2], number, len(sockets) - 1, value.kind)
                self.links.append(link)
                sockets[-1]["link"] = link.number
                given[name] = [str(value.node), value.slot]
            if is_widget:
                if wired:
                    sockets[-1]["widget"] = {"name": name}
                plain = _default(settings, wire) if wired or value is None else value
                given.setdefault(name, plain)
                values.append(plain)
                tall += TEXT if settings.get("multiline") and not wired else WIDGET
                if name in SEEDS or settings.get("control_after_generate"):
                    values.append("fixed" if fixed else "randomize")
                    tall += WIDGET
                if settings.get("image_upload"):
                    values.append("image")
                    tall += WIDGET
        if inputs:
            raise ValueError(f"{kind} has no input {', '.join(inputs)}")
        outputs = [
            {"name": name, "type": wire, "links": []}
            for name, wire in zip(described["output_name"], described["output"], strict=True)
        ]
        tall += ROW * max(sum("widget" not in item for item in sockets), len(outputs))
        pack, version = next((found for start, found in PACKS.items() if kind.startswith(start)), CORE)
        properties: dict[str, Any] = {"Node name for S&R": kind, "cnr_id": pack, "ver": version}
        saved = {
            "id": number,
            "type": kind,
            "pos": list(at),
            "size": [width, height or tall],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": sockets,
            "outputs": outputs,
            **({"title": title} if title else {}),
            "properties": {**properties, "models": list(models)} if models else properties,
            "widgets_values": values,
        }
        self.nodes.append(saved)
        shown = {"title": title or described["display_name"]}
        self.prompt[str(number)] = {"class_type": kind, "inputs": given, "_meta": shown}
        return Node(saved)

    def note(self, text: str, at: Place, size: Place, title: str, **flags: bool) -> None:
        """Add a note. flags: such as collapsed."""
        self.nodes.append(
            {
                "id": len(self.nodes) + 1,
                "type": "MarkdownNote",
                "pos": list(at),
                "size": list(size),
                "flags": flags,
                "order": len(self.nodes),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": title,
                "properties": {},
                "widgets_values": [text],
                **NOTE_COLOURS,
            }
        )

    def workflow(self) -> dict[str, Any]:
        """As the page saves it."""
        self._join()
        return {
            "id": str(uuid.uuid5(NAMESPACE, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": [list(link) for link in self.links],
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 60]}},
            "version": 0.4,
        }

    def _join(self) -> None:
        """Write each link where it begins."""
        for node in self.nodes:
            for slot, item in enumerate(node["outputs"]):
                item["links"] = [link.number for link in self.links if link[1:3] == (node["id"], slot)]


@dataclass
class Blueprint(Graph):
    """A graph that is offered as one node."""

    description: str = ""
    sockets: list[tuple[str, str]] = field(default_factory=list)
    results: list[tuple[str, Output]] = field(default_factory=list)

    def socket(self, name: str, kind: str) -> Output:
        """An input of the node; wired to a widget it is a widget of the node."""
        self.sockets.append((name, kind))
        return Output(INPUTS, len(self.sockets) - 1, kind)

    def workflow(self) -> dict[str, Any]:
        """As the page saves it: one node on the canvas, and its inside."""
        for slot, (_, output) in enumerate(self.results):
            self.links.append(Link(len(self.links) + 1, *output[:2], OUTPUTS, slot, output.kind))
        self._join()
        nodes = {node["id"]: node for node in self.nodes}
        right = max(node["pos"][0] + node["size"][0] for node in self.nodes) + 80
        inputs, shown, widgets = [], [], []
        for slot, (name, kind) in enumerate(self.sockets):
            linked = [link for link in self.links if link[1:3] == (INPUTS, slot)]
            inputs.append(self._end(name, kind, [link.number for link in linked], (-80, 80 + ROW * slot)))
            outer: dict[str, Any] = {"name": name, "type": kind, "label": name, "link": None}
            for link in linked:
                inner = nodes[link.target]["inputs"][link.target_slot]
                if "widget" in inner and "widget" not in outer:
                    outer["widget"] = {"name": name}
                    widgets.append([str(link.target), inner["name"]])
            shown.append(outer)
        ends = {
            slot: link.number for link in self.links for slot in [link.target_slot] if link.target == OUTPUTS
        }
        outputs = [
            self._end(name, output.kind, [ends[slot]], (right + 20, 80 + ROW * slot))
            for slot, (name, output) in enumerate(self.results)
        ]
        key = str(uuid.uuid5(NAMESPACE, self.name))
        inside = {
            "id": key,
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": len(self.nodes),
                "lastLinkId": len(self.links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "description": self.description,
            "inputNode": {"id": INPUTS, "bounding": [-220, 56, 160, 40 + ROW * len(inputs)]},
            "outputNode": {"id": OUTPUTS, "bounding": [right, 56, 128, 40 + ROW * len(outputs)]},
            "inputs": inputs,
            "outputs": outputs,
            "widgets": [],
            "nodes": self.nodes,
            "groups": [],
            "links": [
                {
                    "id": link.number,
                    "origin_id": link.origin,
                    "origin_slot": link.origin_slot,
                    "target_id": link.target,
                    "target_slot": link.target_slot,
                    "type": link.kind,
                }
                for link in self.links
            ],
            "extra": {},
            "category": "Image Tools/Edit by description",
        }
        outer_node = {
            "id": 100,
            "type": key,
            "pos": [0, 0],
            "size": [400, 420],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": shown,
            "outputs": [{"name": name, "type": output.kind, "links": []} for name, output in self.results],
            "title": self.name,
            "properties": {"proxyWidgets": widgets},
            "widgets_values": [],
        }
        return {
            "revision": 0,
            "last_node_id": 100,
            "last_link_id": 0,
            "nodes": [outer_node],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [inside]},
        }

    def _end(self, name: str, kind: str, links: list[int], at: Place) -> dict[str, Any]:
        key = str(uuid.uuid5(NAMESPACE, f"{self.name} {name} {kind} {at}"))
        return {"id": key, "name": name, "type": kind, "linkIds": links, "label": name, "pos": list(at)}


def _specs(described: Info, given: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, dict[str, Any]]]:
    """Name, type, whether it is a widget, and settings of each input, in the page's order."""
    for group in ("required", "optional"):
        for name, (kind, *options) in described["input"].get(group, {}).items():
            settings = options[0] if options else {}
            if kind == "COMFY_AUTOGROW_V3":
                ((part, *_),) = settings["template"]["input"]["required"].values()
                yield from ((key, part, False, {}) for key in list(given) if key.startswith(f"{name}."))
            elif isinstance(kind, list):
                yield name, "COMBO", True, {"options": kind, **settings}
            else:
                yield name, kind, kind in WIDGETS and not settings.get("forceInput"), settings


def _default(settings: Mapping[str, Any], wire: str) -> Any:
    """The value that the page gives a widget."""
    if "default" in settings:
        return settings["default"]
    choices: list[Any] = settings.get("options") or [""]
    if wire == "COMFY_DYNAMICCOMBO_V3":
        return choices[0]["key"]
    return choices[0] if wire == "COMBO" else ""
