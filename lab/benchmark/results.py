"""A run's folder: what was asked in `run.json`, a line for each edit in `results.jsonl`, and its pictures.

A line is written once, when its edit is done: {"method", "name", "swept", "case", "type", "seconds",
"figures"}, and "error" for an edit that failed. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...models.files import replacing, write_bytes
from .cases import Case
from .methods import Method

Line = dict[str, Any]


class Results:
    """The results of a run's folder, appended as they come. Failed edits are taken out, to be done again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        text = self._file.read_bytes() if self._file.exists() else b""
        self.lines = [line for line in parse(text, self._file) if "error" not in line]
        self.done = {(line["method"], line["case"]) for line in self.lines}
        kept = "".join(_text(line) for line in self.lines).encode()
        if kept != text:
            write_bytes(self._file, kept)

    def append(self, line: Line) -> None:
        """Write a line, unless its edit has one."""
        key = line["method"], line["case"]
        if key in self.done:
            return
        with self._file.open("ab") as file:
            file.write(_text(line).encode())
        self.done.add(key)
        self.lines.append(line)

    def missing(self, methods: Sequence[Method], cases: Sequence[Case]) -> list[tuple[Method, Case]]:
        """What is still to do, all methods of a case side by side."""
        wanted = [(method, case) for case in cases for method in methods]
        return [(method, case) for method, case in wanted if (method.label, case.id) not in self.done]


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def parse(text: bytes, file: Path) -> list[Line]:
    """The lines; a last one that a killed run left unfinished is dropped.

    Raises ValueError for any other that is no result, or for an edit with two.
    """
    *whole, _ = text.split(b"\n")
    lines, seen = [], set()
    for number, part in enumerate(whole, start=1):
        try:
            line = json.loads(part)
            key = line["method"], line["case"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} line {number} is no result ({error}): remove that line") from None
        if key in seen:
            raise ValueError(f"{file} line {number} is a second result of {key[0]} for {key[1]}: remove one")
        seen.add(key)
        lines.append(line)
    return lines


def read_results(folder: Path) -> list[Line]:
    """All lines of a run's folder, failed edits among them. Raises ValueError if it has none."""
    file = folder / "results.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder} holds no results.jsonl")
    return parse(file.read_bytes(), file)


def check_run(folder: Path, benchmark: Mapping[str, Any], methods: Sequence[Method]) -> Line:
    """What `run.json` says, with these methods added to it.

    Raises ValueError if the folder is of another benchmark, or of another method of the same name.
    """
    file = folder / "run.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if old and old["benchmark"] != dict(benchmark):
        raise ValueError(f"{folder} holds results of {old['benchmark']}, not of {dict(benchmark)}")
    digests = old.get("methods", {})
    for method in methods:
        if digests.get(method.label, method.digest) != method.digest:
            raise ValueError(
                f"{folder} holds results of another workflow named {method.label!r}: name this one "
                "differently, or write to another folder"
            )
    known = digests | {method.label: method.digest for method in methods}
    return {**old, "benchmark": dict(benchmark), "methods": known}


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    write_bytes(folder / "run.json", (json.dumps(run, indent=1, ensure_ascii=False) + "\n").encode())


def picture_file(folder: Path, method: str, case: str) -> Path:
    """Where the picture of an edit is kept."""
    return folder / "pictures" / _slug(method) / f"{_slug(case)}.png"


def save_picture(folder: Path, method: str, case: str, picture: Image.Image) -> None:
    with replacing(picture_file(folder, method, case)) as part:
        picture.save(part, "PNG")


def _slug(name: str) -> str:
    """A file name that no other name has."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", name)[:80].strip(".")
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"
