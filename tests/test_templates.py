"""The templates' one description: the files in workflows/ and subgraphs/ are what it makes."""

from __future__ import annotations

import json
from typing import Any

from host import ROOT, Host


def test_files_are_up_to_date(host: Host, object_info: dict[str, Any]) -> None:
    """Protects: every template and blueprint is what `lab.templates.command` writes; no other is there."""
    made = dict(host.pack_module("lab.templates.command").files(object_info))
    there = {
        path.relative_to(ROOT)
        for name in ("workflows", "subgraphs")
        for path in (ROOT / name).rglob("*.json")
    }
    assert set(made) == there
    stale = [
        str(path) for path, content in made.items() if json.loads((ROOT / path).read_text("utf-8")) != content
    ]
    assert stale == []


def test_names() -> None:
    """Protects: templates sort in their order, and a card shows their whole name (27 characters)."""
    names = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert [name[:3] for name in names] == [f"{number:02} " for number in range(1, len(names) + 1)]
    assert max(map(len, names)) <= 27


def test_every_template_shows_before_and_after() -> None:
    """Protects: each template that edits a photo has the slider, saves the result at full size, and keeps
    what lies outside the mask; each has its note in English and in Chinese, without code marks, which Nodes
    2.0 shows as blue on grey.
    """
    for path in (ROOT / "workflows").glob("*.json"):
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        kinds = [node["type"] for node in nodes]
        if "LoadImage" in kinds:
            assert {"ImageCompare", "SaveImage", "DescEditCrop", "DescEditStitch"} <= {*kinds}, path.stem
        notes = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
        assert [any("\u4e00" <= letter <= "\u9fff" for letter in note) for note in notes] == [False, True]
        assert not any("`" in note for note in notes), path.stem
