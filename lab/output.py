"""Output of the lab's commands: Markdown tables, pages in docs/, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.files import write_bytes

DOCS = Path(__file__).resolve().parents[1] / "docs"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(template: Path, page: Path, values: Mapping[str, Any]) -> str:
    """Fill the template with `str.format`, write it to `page` and return it."""
    text = template.read_text(encoding="utf-8").format(**values)
    write_bytes(page, text.encode())
    return text


def write_json(file: Path | None, values: Mapping[str, Any]) -> None:
    """One flat JSON object; nothing without a file."""
    if file is not None:
        write_bytes(file, (json.dumps(values, indent=1) + "\n").encode())
