"""A run's folder: its settings in `run.json`, one line per edit in `results.jsonl`, and the images.

A line is written once, when its edit is done: {"method", "name", "swept", "case", "type", "seconds",
"metrics"}, and "error" for an edit that failed. A run that was killed continues where it stopped.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ...models.files import write_bytes
from ...pictures.contact_sheet import save_image
from .cases import Case
from .methods import Method

Result = dict[str, Any]
AnyMethod = TypeVar("AnyMethod", bound=Method)
Metrics = dict[str, float | None]  # None: the region is empty


class Results:
    """The results in a run's folder. When it is opened, failed edits are removed, so that they are
    repeated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        text = self._file.read_bytes() if self._file.exists() else b""
        self.all = [result for result in parse(text, self._file) if "error" not in result]
        self.done = {(result["method"], result["case"]) for result in self.all}
        kept = "".join(_text(result) for result in self.all).encode()
        if kept != text:
            write_bytes(self._file, kept)

    def append(self, result: Result, say: Callable[[str], None] = print) -> None:
        """Write a result, unless its edit has one.

        say: called with the error of a failed edit.
        """
        key = result["method"], result["case"]
        if "error" in result:
            say(f"{key[0]}, {key[1]}: {result['error']}")
        if key in self.done:
            return
        with self._file.open("ab") as file:
            file.write(_text(result).encode())
        self.done.add(key)
        self.all.append(result)

    def missing(self, methods: Sequence[AnyMethod], cases: Sequence[Case]) -> list[tuple[AnyMethod, Case]]:
        """The edits that are not done, all methods of a case together."""
        wanted = [(method, case) for case in cases for method in methods]
        return [(method, case) for method, case in wanted if (method.label, case.id) not in self.done]


def new_result(method: Method, case: Case, seconds: float, metrics: Metrics, error: str = "") -> Result:
    """A result as `results.jsonl` holds it."""
    result = {
        "method": method.label,
        "name": method.name,
        "swept": method.swept,
        "case": case.id,
        "type": case.edit_type,
        "seconds": round(seconds, 3),
        "metrics": metrics,
    }
    return {**result, "error": error} if error else result


def _text(result: Result) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"


def parse(text: bytes, file: Path) -> list[Result]:
    """The results in a file. An unfinished last line of a killed run is ignored.

    Raises ValueError for any other invalid line, and for an edit with two results.
    """
    *whole, _ = text.split(b"\n")
    results, seen = [], set()
    for number, line in enumerate(whole, start=1):
        try:
            result = json.loads(line)
            key = result["method"], result["case"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} line {number} is no result ({error}): remove that line") from None
        if key in seen:
            raise ValueError(f"{file} line {number} is a second result of {key[0]} for {key[1]}: remove one")
        seen.add(key)
        results.append(result)
    return results


def read_results(folder: Path) -> list[Result]:
    """All results in a run's folder, failed edits included. Raises ValueError if there are none."""
    file = folder / "results.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder} holds no results.jsonl")
    return parse(file.read_bytes(), file)


def check_run(folder: Path, benchmark: Mapping[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """The content of `run.json` with these methods added.

    Raises ValueError if the folder has results of another benchmark, or of another method of the same name.
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
    """The file of an edit's picture."""
    return folder / "pictures" / slug(method) / f"{slug(case)}.png"


def save_picture(folder: Path, method: str, case: str, picture: Image.Image) -> None:
    save_image(picture, picture_file(folder, method, case))


def slug(name: str) -> str:
    """A file name, unique for each name."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "_", name)[:80].strip(".")
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"
