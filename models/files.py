"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # ending of what a killed process leaves: nothing reads it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside `path` to write a file to, which is moved to `path` when the block ends.

    When the block raises, the new file is deleted and `path` stays as it was. The folder is made. No other
    process uses the same new path.
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
