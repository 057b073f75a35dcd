"""The pack as the host sees it after its own loader has loaded it."""

from __future__ import annotations

import inspect
import re

import pytest
from host import ROOT, Host


@pytest.fixture(scope="module")
def schemas(host: Host) -> dict:
    """Schema by node id."""
    return {node_id: host.node(node_id).GET_SCHEMA() for node_id in host.node_ids()}


def test_loads(host: Host) -> None:
    """Protects: the host's own loader takes the pack without a warning and finds all the nodes it lists."""
    assert host.load_warnings == []
    assert len(host.node_ids()) == len(host.pack_module("nodes").NODES) > 0


def test_nodes_are_v3(host: Host) -> None:
    """Protects: V3 nodes only; one old-style mapping would make the host ignore all the others."""
    from comfy_api.latest import io

    assert not hasattr(host.pack, "NODE_CLASS_MAPPINGS")
    assert all(issubclass(host.node(node_id), io.ComfyNode) for node_id in host.node_ids())


def test_ids_and_categories(schemas: dict) -> None:
    """Protects: ids that collide with no other pack, and one place in the node menu."""
    assert [node_id for node_id in schemas if not node_id.startswith("DescEdit")] == []
    wrong = [key for key, schema in schemas.items() if not schema.category.startswith("descriptive edit/")]
    assert wrong == []


def test_everything_is_explained(schemas: dict) -> None:
    """Protects: every node has a name, a description and search words, every input a tooltip."""
    missing = []
    for node_id, schema in schemas.items():
        missing += [
            f"{node_id}.{name}" for name in ("display_name", "description") if not getattr(schema, name)
        ]
        missing += [f"{node_id}.search_aliases"] if not schema.search_aliases else []
        missing += [f"{node_id}.{item.id}" for item in schema.inputs if not item.tooltip]
    assert missing == []


def test_execute_takes_what_the_schema_offers(host: Host, schemas: dict) -> None:
    """Protects: an input that a node declares and does not take would fail only when a user wires it."""
    for node_id, schema in schemas.items():
        taken = inspect.signature(host.node(node_id).execute).parameters
        assert {item.id for item in schema.inputs} == set(taken), node_id
        optional = {item.id for item in schema.inputs if item.optional}
        assert {name for name in optional if taken[name].default is inspect.Parameter.empty} == set(), node_id


def test_project_file(host: Host) -> None:
    """Protects: what the registry and the host read about the pack is there and agrees with the code."""
    from comfy_config import config_parser

    project = config_parser.extract_node_configuration(str(ROOT))
    assert project is not None
    assert "comfyui" not in project.project.name.lower()
    assert project.project.dependencies == []
    assert project.project.license.file == "LICENSE"
    assert project.project.supported_comfyui_version == ">=0.30.0"
    assert project.tool_comfy.display_name
    assert project.tool_comfy.publisher_id


def test_rooms_import_one_way() -> None:
    """Protects: relative imports, and arrows that run one way, from lab down to models and pictures."""
    order = {"models": 0, "pictures": 0, "patches": 1, "metrics": 2, "training": 2, "nodes": 3, "lab": 4}
    absolute = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(order)})\b.*", re.MULTILINE)
    relative = re.compile(r"^\s*from (\.+)(\w*).*", re.MULTILINE)
    wrong = []
    for file in (file for room in order for file in (ROOT / room).rglob("*.py")):
        name, text = file.relative_to(ROOT), file.read_text(encoding="utf-8")
        found = [match[0] for match in absolute.finditer(text)]
        found += [
            match[0]
            for match in relative.finditer(text)
            if len(match[1]) == len(name.parts) and order.get(match[2], 9) > order[name.parts[0]]
        ]
        wrong += [f"{name}: {line.strip()}" for line in found]
    assert wrong == []


def test_every_widget_works_without_nodes_2(schemas: dict) -> None:
    """Protects: each input is a socket or a kind of widget that the page's default renderer can set."""
    from comfy_api.latest import io

    assert issubclass(io.Curve.Input, io.WidgetInput)  # which it cannot
    for node_id, schema in schemas.items():
        inputs = [item for item in schema.inputs if isinstance(item, io.WidgetInput)]
        widgets = [item for item in inputs if not item.force_input]
        assert {item.io_type for item in widgets} <= {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}, node_id
