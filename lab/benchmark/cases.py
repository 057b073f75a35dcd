"""A benchmark's cases, and the folder that holds a benchmark.

A folder has `cases.jsonl`, one case per line:

    {"id": "fox-1", "type": "object", "source_image": "fox.png", "source_description": "a fox on snow",
     "edit_description": "a wolf on snow", "instruction": "make it a wolf", "mask": "fox_mask.png",
     "target_image": "wolf.png"}

Images are files in the folder. `mask` is white in the edit region. `instruction`, `mask` and `target_image`
are optional.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from ...models.tiny_studio.scenes import EditPair
from ...training.pairs import Picture

TEXTS = ("source_description", "edit_description", "instruction")
PICTURES = ("source_image", "mask", "target_image")
_NEEDED = ("id", "type", "source_image", "source_description", "edit_description")
_KNOWN = {"id", "type", *TEXTS, *PICTURES}


class CaseError(ValueError):
    """A case that cannot be used."""


class Drawn(NamedTuple):
    """What a case of the Tiny Studio has beside its images.

    pair: the scenes.
    noise: [4, 16, 16], the start of methods that sample in this process.
    """

    pair: EditPair
    noise: torch.Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One edit. Texts that a benchmark does not have are empty.

    origin: where the case is written, for messages.
    drawn: None for all benchmarks but the Tiny Studio's.
    """

    id: str
    edit_type: str
    origin: str
    source_image: Picture
    source_description: str = ""
    edit_description: str = ""
    instruction: str = ""
    mask: Picture | None = None
    target_image: Picture | None = None
    drawn: Drawn | None = None

    @property
    def seed(self) -> int:
        """The seed, equal for all methods, so that they are compared on the same noise."""
        return zlib.crc32(self.id.encode())

    def read(self, role: str) -> Image.Image | None:
        """The image of one of PICTURES, upright, in RGB, or L for the mask; None if the case has none.

        Raises CaseError if the file is missing or is not an image.
        """
        picture: Picture | None = getattr(self, role)
        return None if picture is None else self._open(role, picture)

    def source(self) -> Image.Image:
        """The source picture, which every case has, as `read` gives it."""
        return self._open("source_image", self.source_image)

    def _open(self, role: str, picture: Picture) -> Image.Image:
        try:
            with picture.open() as file:
                return ImageOps.exif_transpose(file).convert("L" if role == "mask" else "RGB")
        except FileNotFoundError:
            problem = "is missing"
        except Exception as error:  # Pillow raises almost any exception for broken bytes
            problem = f"cannot be read ({error})"
        raise CaseError(f"case {self.id} ({self.origin}): its {role} {picture.name} {problem}")


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases as a list. Raises ValueError if there are none, or if two have the same id, naming both."""
    found: dict[str, Case] = {}
    for case in cases:
        other = found.setdefault(case.id, case)
        if other is not case:
            raise ValueError(f"two cases have the id {case.id!r}: {other.origin} and {case.origin}")
    if not found:
        raise ValueError("the benchmark has no cases")
    return list(found.values())


def first_of_each_type(cases: Iterable[Case], count: int) -> list[Case]:
    """The first `count` cases of each edit type."""
    seen: Counter[str] = Counter()
    found = []
    for case in cases:
        seen[case.edit_type] += 1
        if seen[case.edit_type] <= count:
            found.append(case)
    return found


def file_picture(folder: Path, name: str) -> Picture:
    """A file in the folder. Raises ValueError for a name that leaves the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of {folder}")
    return Picture(name, partial(Image.open, path))


def read_json(path: Path) -> Any:
    """A JSON file. Raises ValueError, naming the file, if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def read_folder(folder: Path) -> list[Case]:
    """The cases of a benchmark folder. Raises ValueError for lines that are not cases."""
    path = folder / "cases.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is not a benchmark folder: {error}") from None
    return [
        _from_line(folder, f"{path.name} line {number}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _from_line(folder: Path, origin: str, line: str) -> Case:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return from_values(origin, values, partial(file_picture, folder))


def from_values(origin: str, values: Any, picture: Callable[[str], Picture]) -> Case:
    """A case of named values. picture: makes a Picture of the value of one of PICTURES."""
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: a case is an object of named values")
    values = {name: value for name, value in values.items() if value not in (None, "")}
    missing = [name for name in _NEEDED if name not in values]
    unknown = sorted(set(values) - _KNOWN)
    if missing or unknown:
        found = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise ValueError(f"{origin}: the case {found}; the names are {', '.join(sorted(_KNOWN))}")
    wrong = [name for name in ("type", *TEXTS) if not isinstance(values.get(name, ""), str)]
    if wrong:
        raise ValueError(f"{origin}: {wrong[0]} is not a text")
    pictures: dict[str, Any] = {name: picture(values[name]) for name in PICTURES if name in values}
    texts = {name: values[name] for name in TEXTS if name in values}
    return Case(str(values["id"]), values["type"], origin, **pictures, **texts)
