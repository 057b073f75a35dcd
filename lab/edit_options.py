"""Arguments of `python dev.py edit`, checked before anything is installed. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True)
class EditOptions:
    """What to edit: the given image, or the sample scenes if there is none."""

    image: Path | None
    source: str
    edit: str
    mask: Path | None
    checkpoint: Path | None
    out: Path
    json: Path | None


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str]) -> EditOptions:
    """Read the arguments; invalid ones end the program with one line and status 2."""
    parser = _OneLineParser(
        prog="dev.py edit",
        description="Edit the sample scenes that ship with the pack, or an image of your own, through a real "
        "ComfyUI server. The model is the Tiny Studio, which knows simple drawn scenes of 128 x 128; other "
        "sizes are fitted. Its words are in the help of Load Tiny Studio. With --checkpoint the model is "
        "yours, and the image keeps its size.",
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="an image to edit")
    parser.add_argument("--source", default="", metavar="TEXT", help="describes the image as it is")
    parser.add_argument("--edit", default="", metavar="TEXT", help="describes the image as it should be")
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="edit region: white is edited, black is kept"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a Stable Diffusion 1.x checkpoint to edit --image with",
    )
    out = Path("output/edit")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where to write (output/edit)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics to FILE")
    given = parser.parse_args(arguments)
    for name in ("image", "mask", "checkpoint"):
        file = getattr(given, name)
        if file is not None and not file.is_file():
            parser.error(f"--{name}: there is no file {file}")
    if given.image is None:
        unused = [name for name in ("source", "edit", "mask", "checkpoint") if getattr(given, name)]
        if unused:
            parser.error(f"--{unused[0]} needs --image")
    else:
        for name in ("source", "edit"):
            if not getattr(given, name).strip():
                parser.error(f"--{name}: an image needs a description that is not empty")
        if given.source.split() == given.edit.split():
            parser.error("--edit: it is the same as --source, so there is nothing to edit")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out: {given.out} is a file")
    source, edit = given.source.strip(), given.edit.strip()
    return EditOptions(given.image, source, edit, given.mask, given.checkpoint, given.out, given.json)
