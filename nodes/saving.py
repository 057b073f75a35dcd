"""Checks file names that users give and finds the next free name. No file is overwritten."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

SUFFIX = ".safetensors"
LONGEST = 200  # bytes: file systems allow 255; a counter and an extension are appended
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_PAIR = re.compile(r"pair_(\d+)[_.]")
# Devices, with any extension (learn.microsoft.com, "Naming Files, Paths, and Namespaces").
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def checked_name(name: str) -> str:
    """A file name without extension.

    Raises ValueError for a name that contains a folder or that some system cannot write.
    """
    stem = name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name
    problem = None
    if not stem.strip():
        problem = "is empty"
    elif found := _FORBIDDEN.search(stem):
        folder = found[0] in "/\\"
        problem = "has a folder in it" if folder else f"has the character {found[0]!r} in it"
    elif stem != stem.strip() or stem.endswith("."):
        problem = "begins or ends with a space or ends with a dot"
    elif stem.startswith("."):
        problem = "begins with a dot"
    elif _DEVICE.match(stem):
        problem = "is the name of a device on Windows"
    elif len(stem.encode(errors="replace")) > LONGEST:
        problem = f"is longer than {LONGEST} bytes"
    elif not stem.isprintable():
        problem = "has characters that cannot be shown"
    if problem:
        raise ValueError(
            f"name is {name!r}, which {problem}: give a plain file name that every system can write, "
            "such as soft-portraits"
        )
    return stem


def next_pair(folder: Path) -> str:
    """Name of the next edit pair in a folder: pair_00001, or one more than the highest there."""
    found = [_PAIR.match(file.name) for file in folder.iterdir()] if folder.is_dir() else []
    return f"pair_{max((int(match[1]) for match in found if match), default=0) + 1:05}"


def next_path(folder: Path, stem: str) -> Path:
    """Path of the next file of a name, counted as Save Image counts: `stem_00001_.safetensors`, and so on.

    That node's %year% and the like work. `folder` is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _, stem, counter, *_ = folder_paths.get_save_image_path(stem, str(folder))
    while os.path.lexists(path := folder / f"{stem}_{counter:05}_{SUFFIX}"):
        counter += 1
    return path
