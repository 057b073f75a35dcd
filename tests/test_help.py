"""What a user reads: translations, and the help page of every node."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from host import ROOT, Host

LANGUAGES = ("en", "zh")
DOCS = ROOT / "web" / "docs"
HEADINGS = {
    "en": ("Works with", "Does not work with", "Connect after it", "Common mistakes"),
    "zh": ("可配合", "不可配合", "后接", "常见错误"),
}


@pytest.fixture(scope="module")
def schemas(host: Host) -> dict[str, Any]:
    """Schema by node id."""
    return {node_id: host.node(node_id).GET_SCHEMA() for node_id in host.node_ids()}


def inputs_of(schema: Any) -> dict[str, Any]:
    """A node's inputs by name."""
    return {item.id: item for item in schema.inputs}


def texts(schema: Any) -> dict[str, Any]:
    """What a translation file holds of a node, from its schema."""

    def slot(name: str, tooltip: str | None) -> dict[str, str]:
        return {"name": name, **({"tooltip": tooltip} if tooltip else {})}

    found = {"display_name": schema.display_name, "description": schema.description}
    inputs = {
        key: slot(item.display_name or item.id, item.tooltip) for key, item in inputs_of(schema).items()
    }
    outputs = {
        str(index): slot(item.display_name or item.io_type, item.tooltip)
        for index, item in enumerate(schema.outputs)
    }
    return {**found, **({"inputs": inputs} if inputs else {}), **({"outputs": outputs} if outputs else {})}


def shape(entry: Any) -> Any:
    """A translation without its words."""
    return {key: shape(value) for key, value in entry.items()} if isinstance(entry, dict) else type(entry)


def translation(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_english_is_the_schemas_own(schemas: dict[str, Any]) -> None:
    """Protects: the English page from saying something else than the node does."""
    assert translation("en") == {node_id: texts(schema) for node_id, schema in schemas.items()}


def test_chinese_is_complete(schemas: dict[str, Any]) -> None:
    """Protects: every name, description and tooltip is translated, and nothing that is gone is left over."""
    chinese = translation("zh")
    assert shape(chinese) == shape({node_id: texts(schema) for node_id, schema in schemas.items()})
    for node_id, entry in chinese.items():
        words = [entry["display_name"], entry["description"]]
        words += [item["tooltip"] for item in entry.get("inputs", {}).values()]
        assert [text for text in words if not re.search("[\u4e00-\u9fff]", text)] == [], node_id


def test_choices_are_explained_by_their_names(schemas: dict[str, Any]) -> None:
    """Protects: a translated tooltip that explains a choice calls it as the list does."""
    chinese = translation("zh")
    for node_id, schema in schemas.items():
        for key, item in inputs_of(schema).items():
            choices = [getattr(option, "key", option) for option in getattr(item, "options", None) or []]
            named = [word for word in choices if f"{word}:" in item.tooltip]
            explained = chinese[node_id]["inputs"][key]["tooltip"]
            assert [word for word in named if word not in explained] == [], f"{node_id}.{key}"


def test_every_node_has_its_pages(schemas: dict[str, Any]) -> None:
    """Protects: pages for nodes that are, in both languages, and none for nodes that are gone."""
    assert {path.name for path in DOCS.iterdir()} == {*schemas, "pictures"}
    assert {path.name for node_id in schemas for path in (DOCS / node_id).iterdir()} == {"en.md", "zh.md"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages(language: str, schemas: dict[str, Any]) -> None:
    """Protects: each page has the node's name, every input with what its tooltip says, and every section."""
    for node_id, schema in schemas.items():
        page, entry = (
            (DOCS / node_id / f"{language}.md").read_text(encoding="utf-8"),
            translation(language)[node_id],
        )
        assert page.startswith(f"# {entry['display_name']}\n\n{entry['description']}\n"), node_id
        for key, item in inputs_of(schema).items():
            begins = rf"- \*\*(?:{item.id}\*\*|[^*]+\*\* \({item.id}\)),"
            line = next((line for line in page.splitlines() if re.match(begins, line)), "")
            assert line.endswith(entry["inputs"][key]["tooltip"]), f"{node_id}.{key}"
        for heading in HEADINGS[language]:
            section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
            assert section.strip(), f"{node_id}: {heading}"


def test_generated_files_are_up_to_date(host: Host) -> None:
    """Protects: English texts and the pages' lists are what `dev.py docs` writes, and Chinese lacks none."""
    files, missing = host.pack_module("lab.pages").generated(ROOT)
    assert len(files) == 1 + 2 * len(host.node_ids())
    assert [file for file, text in files.items() if file.read_text(encoding="utf-8") != text] == []
    assert missing == []


def test_docs_command(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects: `dev.py docs` writes new pages and stale lists, keeps what people wrote, and names each
    Chinese text that is missing or left over.
    """
    for name in ("locales", "web"):
        shutil.copytree(ROOT / name, tmp_path / name)
    pages = tmp_path / "web" / "docs"
    edited = pages / "DescEditMetrics" / "en.md"
    whole = edited.read_text(encoding="utf-8")
    stale = re.sub(r"(?m)^- \*\*source\*\*.*\n", "", whole).replace("INT", "FLOAT")
    edited.write_text(stale.replace("Nothing is downloaded.", "Old.", 1) + "- **More.** Written by hand.\n")
    (pages / "DescEditInvert" / "zh.md").unlink()
    file = tmp_path / "locales" / "zh" / "nodeDefs.json"
    chinese = json.loads(file.read_text(encoding="utf-8"))
    del chinese["DescEditMetrics"]["inputs"]["mask"]["tooltip"]
    chinese["DescEditGone"] = {"display_name": "x"}
    file.write_text(json.dumps(chinese))
    assert host.pack_module("lab.pages").main(tmp_path) == 1
    said = capsys.readouterr().out.splitlines()
    assert "locales/zh/nodeDefs.json: DescEditGone is left over" in said
    assert "locales/zh/nodeDefs.json: DescEditMetrics.inputs.mask.tooltip is missing" in said
    assert edited.read_text(encoding="utf-8") == whole + "- **More.** Written by hand.\n"
    new = (pages / "DescEditInvert" / "zh.md").read_text(encoding="utf-8")
    old = (DOCS / "DescEditInvert" / "zh.md").read_text(encoding="utf-8")
    for heading in ("输入", "输出"):
        assert (
            new.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
            == (old.partition(f"\n## {heading}\n")[2].partition("\n## ")[0])
        )
    for heading in HEADINGS["zh"]:
        assert f"\n## {heading}\n" in new


def test_pictures() -> None:
    """Protects: every picture on a page exists, every picture is on a page, and the pack stays small."""
    shown = {
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    there = {path.relative_to(DOCS).as_posix() for path in (DOCS / "pictures").iterdir()}
    assert shown == there != set()
    assert sum(path.stat().st_size for path in DOCS.rglob("*") if path.is_file()) < 3_000_000


def test_the_nodes_page_shows_every_node(schemas: dict[str, Any]) -> None:
    """Protects: docs/nodes.md has a section for every node, with its picture and its help page."""
    docs = ROOT / "docs"
    page = (docs / "nodes.md").read_text(encoding="utf-8")
    for node_id, schema in schemas.items():
        section = page.partition(f"\n### {schema.display_name}\n")[2].partition("\n#")[0]
        assert f'"pictures/nodes/{node_id}.jpg"' in section, node_id
        assert f"(../web/docs/{node_id}/en.md)" in section, node_id
    assert {path.stem for path in (docs / "pictures" / "nodes").iterdir()} == set(schemas)


def test_the_server_has_pages_and_translations(live_server: Any) -> None:
    """Protects: the addresses from which ComfyUI's page takes help and translations."""
    folder = "/extensions/ComfyUI-DescriptiveEdit/docs"
    page = (DOCS / "DescEditInvert" / "zh.md").read_bytes()
    assert live_server.get(f"{folder}/DescEditInvert/zh.md") == page
    picture = DOCS / "pictures" / "losses.jpg"
    assert live_server.get(f"{folder}/pictures/losses.jpg") == picture.read_bytes()
    served = live_server.json("/i18n")
    assert served["zh"]["nodeDefs"]["DescEditInvert"] == translation("zh")["DescEditInvert"]
