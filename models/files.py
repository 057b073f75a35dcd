"""Atomic file writes: a file appears complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # extension of what a killed process leaves; nothing reads it


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yields a temporary path beside `path`; it is renamed to `path` when the block ends.

    If the block raises, the temporary file is deleted and `path` is unchanged. The folder is created. No
    other process uses the same temporary path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` with `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content)
