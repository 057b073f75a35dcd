"""Checkpoints of a run: `step-000123.pt` in a folder. The last few are kept; a run continues from the
newest.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..models.files import PART
from .state import BrokenState
from .trainer import Trainer

_NAME = re.compile(r"step-(\d+)\.pt")


class Checkpoints:
    """keep: how many of the last ones are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def files(self) -> list[Path]:
        """From the newest to the oldest."""
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.glob("*")]
        return [
            path for _, path in sorted(((int(name[1]), path) for name, path in named if name), reverse=True)
        ]

    def save(self, trainer: Trainer) -> Path:
        """Save a checkpoint; older ones are deleted only after it is complete.

        Raises OSError if it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{trainer.step:06}.pt"
        trainer.save(path)
        for old in self.files()[self.keep :]:
            old.unlink(missing_ok=True)
        for part in self.folder.glob(f"*{PART}"):  # of a run that was killed
            part.unlink(missing_ok=True)
        return path

    def resume(self, trainer: Trainer) -> Path | None:
        """Load the newest checkpoint that can be read, skipping broken ones with a warning. None if there are
        none.

        Raises ValueError if none of them can be read, or if it belongs to another configuration.
        """
        files = self.files()
        for path in files:
            try:
                trainer.load(path)
            except BrokenState as problem:
                logging.warning("%s: trying the one before", problem)
            else:
                return path
        if files:
            raise ValueError(
                f"none of the {len(files)} checkpoints in {self.folder} can be read: move them away to "
                "start again"
            )
        return None
