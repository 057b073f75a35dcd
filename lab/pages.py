"""`python dev.py docs`: writes the English texts and the lists on the help pages from the schemas.

It names what is missing in Chinese. Text written by hand (all of a page but its title, description and lists)
stays unchanged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..nodes import NODES

ROOT = Path(__file__).resolve().parent.parent
WORDS = {
    "en": {
        "lists": ("Inputs", "Outputs"),
        "sections": ("Works with", "Does not work with", "Connect after it", "Common mistakes"),
        "range": "{} to {}",
        "default": "default {}",
        "optional": "optional",
        "advanced": "advanced",
    },
    "zh": {
        "lists": ("输入", "输出"),
        "sections": ("可配合", "不可配合", "后接", "常见错误"),
        "range": "{} 到 {}",
        "default": "默认 {}",
        "optional": "可选",
        "advanced": "高级",
    },
}


def texts(schema: Any) -> dict[str, Any]:
    """A node's entry in a translation file, in English."""

    def slot(name: str, tooltip: str | None) -> dict[str, str]:
        return {"name": name, **({"tooltip": tooltip} if tooltip else {})}

    inputs = {item.id: slot(item.display_name or item.id, item.tooltip) for item in schema.inputs}
    outputs = {
        str(index): slot(item.display_name or item.io_type, item.tooltip)
        for index, item in enumerate(schema.outputs)
    }
    found = {"display_name": schema.display_name, "description": schema.description}
    return found | ({"inputs": inputs} if inputs else {}) | ({"outputs": outputs} if outputs else {})


def input_line(item: Any, text: dict[str, str], words: dict[str, Any]) -> str:
    """One input on a help page: name, type, range, default and tooltip."""
    name = f"**{item.id}**" if text["name"] == item.id else f"**{text['name']}** ({item.id})"
    kind, default = item.io_type, getattr(item, "default", None)
    if isinstance(item, io.Autogrow.Input):
        kind = f"{item.template.input.io_type} ..."
    parts = [name, kind]
    if getattr(item, "min", None) is not None:
        parts.append(words["range"].format(item.min, item.max))
    if isinstance(default, int | float | str) and default != "" and "\n" not in str(default):
        parts.append(words["default"].format(default))
    parts += [words["optional"]] if item.optional else []
    parts += [words["advanced"]] if item.advanced else []
    return f"- {', '.join(parts)}: {text['tooltip']}"


def output_line(item: Any, text: dict[str, str]) -> str:
    """One output on a help page: name, type and tooltip."""
    name = f"**{text['name']}**" + (f", {item.io_type}" if text["name"] != item.io_type else "")
    return f"- {name}: {text['tooltip']}" if "tooltip" in text else f"- {name}"


def page(schema: Any, text: dict[str, Any], language: str, old: str) -> str:
    """A node's help page: `old` with the current title, description and lists.

    text: the node's entry in the translation file.
    old: empty for a new page.
    """
    words = WORDS[language]
    sections = old.find(f"\n## {words['sections'][0]}\n")
    own = old[sections:] if sections >= 0 else "".join(f"\n## {name}\n\n\n" for name in words["sections"])
    before = old[: max(sections, 0)].partition(f"\n## {words['lists'][0]}\n")[0]
    before = before.partition(f"\n## {words['lists'][1]}\n")[0]
    prose = "".join(before.split("\n\n", 2)[2:]).strip()
    found = [f"# {text['display_name']}", text["description"], *([prose] if prose else [])]
    lists = (
        [input_line(item, text["inputs"][item.id], words) for item in schema.inputs],
        [output_line(item, text["outputs"][str(index)]) for index, item in enumerate(schema.outputs)],
    )
    for name, lines in zip(words["lists"], lists, strict=True):
        found += [f"## {name}", "\n".join(lines)] if lines else []
    return "\n\n".join(found) + "\n" + own


def untranslated(english: Any, other: Any, path: str = "") -> list[str]:
    """Keys that a translation lacks, or that are left over."""
    if not isinstance(english, dict):
        return []
    found = [f"{path}{key} is missing" for key in english if key not in other]
    found += [f"{path}{key} is left over" for key in other if key not in english]
    for key in english.keys() & other.keys():
        found += untranslated(english[key], other[key], f"{path}{key}.")
    return sorted(found)


def filled(english: Any, other: Any) -> Any:
    """The translation `other`, with English texts where it has none and without leftovers."""
    if not isinstance(english, dict):
        return other
    return {key: filled(text, other[key]) if key in other else text for key, text in english.items()}


def generated(root: Path) -> tuple[dict[Path, str], list[str]]:
    """The generated files below `root` with their content, and what is missing in Chinese."""
    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
    english = {node_id: texts(schema) for node_id, schema in schemas.items()}
    chinese = json.loads((root / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    files = {
        root / "locales" / "en" / "nodeDefs.json": json.dumps(english, indent=1, ensure_ascii=False) + "\n"
    }
    for language, entries in (("en", english), ("zh", filled(english, chinese))):
        for node_id, schema in schemas.items():
            file = root / "web" / "docs" / node_id / f"{language}.md"
            old = file.read_text(encoding="utf-8") if file.is_file() else ""
            files[file] = page(schema, entries[node_id], language, old)
    return files, untranslated(english, chinese)


def main(root: Path = ROOT) -> int:
    """Write the generated files that differ and print their names; 1 if a Chinese text is missing or left
    over.
    """
    files, missing = generated(root)
    for file, content in files.items():
        if not file.is_file() or file.read_text(encoding="utf-8") != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8", newline="\n")
            print(f"wrote {file.relative_to(root).as_posix()}")
    for text in missing:
        print(f"locales/zh/nodeDefs.json: {text}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
