"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from host import Host


@pytest.fixture(scope="module")
def files(host: Host) -> Any:
    return host.pack_module("models.files")


def test_a_file_is_replaced_whole(files: Any, tmp_path: Path) -> None:
    """Protects: a file is there only when it is whole, in a folder that is made, and nothing else is left."""
    path = tmp_path / "new" / "deep" / "file.bin"
    with files.replacing(path) as part:
        part.write_bytes(b"half")
        assert not path.exists()
    files.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(files: Any, tmp_path: Path, error: type[BaseException]) -> None:
    """Protects: whatever stops a write, the file before stays and the half of the new one goes."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"before")

    def write() -> None:
        with files.replacing(path) as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file(files: Any, tmp_path: Path) -> None:
    """Protects: two writers of one file do not meet: the one that ends last leaves its whole content."""
    path = tmp_path / "file.bin"
    with files.replacing(path) as first:
        first.write_bytes(b"first, longer")
        files.write_bytes(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first, longer"
    assert list(tmp_path.iterdir()) == [path]
