"""What is encoded of edit pairs, how often, and the index that joins the shards of many processes."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from host import Host
from PIL import Image

SIZE = 64
TEXTS = ("a red circle", "a blue circle", "a green circle")


@pytest.fixture(scope="module")
def cache(host: Host) -> Any:
    return host.pack_module("training.cache")


@pytest.fixture(scope="module")
def studio(host: Host) -> Any:
    """The Tiny Studio's MODEL, CLIP and VAE."""
    return host.execute("DescEditTinyStudio")[:3]


class Counted:
    """A VAE or CLIP that counts what it encodes."""

    def __init__(self, encoder: Any, method: str) -> None:
        self._encoder, self._method, self.calls = encoder, method, 0

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self.calls += 1
        return getattr(self._encoder, name)


class Encoders:
    """What `encode_shard` loads."""

    def __init__(self, studio: Any) -> None:
        self.clip, self.vae = Counted(studio[1], "encode_from_tokens"), Counted(studio[2], "encode")

    def __call__(self) -> tuple[Any, Any]:
        return self.vae, self.clip

    @property
    def calls(self) -> tuple[int, int]:
        """Pictures and texts encoded."""
        return self.vae.calls, self.clip.calls


@pytest.fixture
def encoders(studio: Any) -> Encoders:
    return Encoders(studio)


def write_pair(folder: Path, number: int, edit_text: str = "") -> None:
    """A pair of random pictures, and texts of three that take turns."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(number)
    size = (SIZE, SIZE, 3) if number % 2 else (SIZE, 2 * SIZE, 3)
    for role in ("source", "edit"):
        pixels = rng.integers(0, 256, size, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}_{role}.png")
    texts = {"source": TEXTS[number % 3], "edit": edit_text or TEXTS[(number + 1) % 3]}
    (folder / f"{number:03d}.json").write_text(json.dumps(texts), encoding="utf-8")


@pytest.fixture
def data(host: Host, tmp_path: Path) -> Any:
    """Seven pairs in a folder, the fourth bad."""
    for number in range(7):
        write_pair(tmp_path / "pairs", number)
    (tmp_path / "pairs" / "003_edit.png").unlink()
    return host.pack_module("training.sources").DataConfig(
        str(tmp_path / "pairs"), resolution=SIZE + 8, step=8
    )


def refuse(*_: Any) -> Any:
    raise AssertionError


def test_shards_make_the_whole(cache: Any, data: Any, tmp_path: Path, encoders: Encoders) -> None:
    """Protects: however many processes encode, the pairs are the same in the same order, without the bad one;
    until the last shard is there, there is no whole.
    """
    found = []
    for world in (1, 2, 3, 8):
        folder = tmp_path / f"of{world}"
        for rank in reversed(range(world)):
            assert cache.indexed_pairs(data, "tiny", folder) is None
            cache.encode_shard(data, "tiny", encoders, folder, (rank, world))
        pairs = cache.indexed_pairs(data, "tiny", folder)
        assert {str(path.relative_to(folder)) for path in folder.glob("??/*")} == {
            *(file for files in pairs.files for file in files),
            *(file for _, file in pairs.whites),
            pairs.empty_text,
        }
        found.append(replace(pairs, folder=tmp_path))
    wide = [size[0] != size[1] for size in found[0].sizes]
    assert wide == [number % 2 == 0 for number in (0, 1, 2, 4, 5, 6)]
    assert len(set(found[0].sizes)) == len(found[0].whites) == 2
    assert all(pairs == found[0] for pairs in found)


def test_nothing_twice(
    cache: Any, data: Any, tmp_path: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a picture and a text is encoded once, however many pairs have it; with an index no encoder is
    loaded and no pair read, by any number of processes.
    """
    folder = tmp_path / "encoded"
    told = []
    cache.encode_shard(data, "tiny", encoders, folder, report=told.append)
    assert told == [1, 2, 3, 4, 5, 6]
    assert encoders.calls == (2 * 6 + 2, len(TEXTS) + 1)
    pairs = cache.indexed_pairs(data, "tiny", folder)
    monkeypatch.setattr(cache, "read_pairs", refuse)
    for shard in ((0, 1), (1, 2)):
        cache.encode_shard(data, "tiny", refuse, folder, shard)
    assert cache.indexed_pairs(data, "tiny", folder) == pairs


def test_what_changes(cache: Any, data: Any, tmp_path: Path, encoders: Encoders, studio: Any) -> None:
    """Protects: a changed caption encodes a text and no picture, a changed picture no text, other settings
    and encoders have an index of their own.
    """
    folder = tmp_path / "encoded"
    cache.encode_shard(data, "tiny", encoders, folder)
    before = cache.indexed_pairs(data, "tiny", folder)
    assert cache.indexed_pairs(data, "other", folder) is None
    assert cache.indexed_pairs(replace(data, limit=2), "tiny", folder) is None
    write_pair(tmp_path / "pairs", 5, "a square")
    assert cache.indexed_pairs(data, "tiny", folder) is None
    captions = Encoders(studio)
    cache.encode_shard(data, "tiny", captions, folder)
    assert captions.calls == (0, 1)
    after = cache.indexed_pairs(data, "tiny", folder)
    assert after.files[4][:3] == before.files[4][:3]
    assert after.files[4][3] != before.files[4][3]
    assert after.files[:4] + after.files[5:] == before.files[:4] + before.files[5:]
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "pairs" / "005_edit.png")
    pictures = Encoders(studio)
    cache.encode_shard(data, "tiny", pictures, folder)
    assert pictures.calls == (1, 0)


def test_a_cache_of_before(
    cache: Any, data: Any, tmp_path: Path, encoders: Encoders, studio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: an index and texts of another layout, as before texts were kept with their pooled text, are
    not read: texts are encoded again, pictures are not.
    """
    folder = tmp_path / "encoded"
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_LAYOUT", "of before")
        cache.encode_shard(data, "tiny", encoders, folder)
        assert cache.indexed_pairs(data, "tiny", folder) is not None
    assert cache.indexed_pairs(data, "tiny", folder) is None
    again = Encoders(studio)
    cache.encode_shard(data, "tiny", again, folder)
    assert again.calls == (0, len(TEXTS) + 1)
    text = cache.indexed_pairs(data, "tiny", folder).batch([0], torch.device("cpu"), lambda x: x).edit_text[0]
    clip = studio[1]
    whole = clip.encode_from_tokens(clip.tokenize(TEXTS[1]), return_pooled=True)
    torch.testing.assert_close(tuple(text), whole, rtol=1 / 2048, atol=1e-6)


def test_too_many_bad_in_all_shards(cache: Any, data: Any, tmp_path: Path, encoders: Encoders) -> None:
    """Protects: two bad samples that different processes met are refused as they are when one meets both."""
    (tmp_path / "pairs" / "004_edit.png").unlink()
    message = (
        "2 of 7 edit pairs in pairs cannot be used, more than 1%; the first is 003: there is no 003_edit"
    )
    with pytest.raises(ValueError, match=message):
        cache.encode_shard(data, "tiny", encoders, tmp_path / "whole")
    for rank in range(2):
        cache.encode_shard(data, "tiny", encoders, tmp_path / "shards", (rank, 2))
    with pytest.raises(ValueError, match=message):
        cache.indexed_pairs(data, "tiny", tmp_path / "shards")


@pytest.mark.parametrize("full", [5, 19])
def test_a_full_disk(
    cache: Any,
    data: Any,
    tmp_path: Path,
    encoders: Encoders,
    studio: Any,
    monkeypatch: pytest.MonkeyPatch,
    full: int,
) -> None:
    """Protects: a full disk, at a pair or at the index, is said, leaves no half file and loses nothing."""
    folder = tmp_path / "encoded"
    write_bytes, written = Path.write_bytes, []

    def write(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == full:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="the disk is full: what is encoded is kept") as raised:
            cache.encode_shard(data, "tiny", encoders, folder)
    assert raised.value.errno == errno.ENOSPC
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert len(kept) == full - 1
    for path in kept:
        safetensors.torch.load_file(path)
    again = Encoders(studio)
    cache.encode_shard(data, "tiny", again, folder)
    assert sum(again.calls) == 18 - len(kept)
    assert len(cache.indexed_pairs(data, "tiny", folder)) == 6


def test_damaged_files(cache: Any, data: Any, tmp_path: Path, encoders: Encoders, studio: Any) -> None:
    """Protects: training on a file that cannot be read says what to do, and doing it makes the file again."""
    folder = tmp_path / "encoded"
    cache.encode_shard(data, "tiny", encoders, folder)
    pairs = cache.indexed_pairs(data, "tiny", folder)
    content = [(folder / file).read_bytes() for file in pairs.files[0][:2]]
    (folder / pairs.files[0][0]).write_bytes(content[0][:50])
    (folder / pairs.files[0][1]).unlink()
    message = r"cannot be read .*: delete the index files \(index-\*\.json\) in .*encoded"
    with pytest.raises(ValueError, match=message):
        pairs.batch([0], torch.device("cpu"), lambda latent: latent)
    for path in folder.glob("index-*.json"):
        path.unlink()
    again = Encoders(studio)
    cache.encode_shard(data, "tiny", again, folder)
    assert again.calls == (2, 0)
    assert [(folder / file).read_bytes() for file in pairs.files[0][:2]] == content


def test_numbers_that_are_not_finite(cache: Any, data: Any, tmp_path: Path, studio: Any) -> None:
    """Protects: an encoder that overflows is refused by the pair's name and leaves no file."""

    class Broken(Counted):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return self._encoder.encode(pixels) * 1e6

    folder = tmp_path / "encoded"
    with pytest.raises(ValueError, match="the encoded source of 000 has values that are not finite"):
        cache.encode_shard(data, "tiny", lambda: (Broken(studio[2], "encode"), studio[1]), folder)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 1


def test_file_fingerprint(cache: Any, tmp_path: Path) -> None:
    """Protects: a file's fingerprint changes with any byte of it, and not with its name."""
    content = bytes(range(256)) * (1 << 13)
    names = ("a", "b", "c")
    for name in names:
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "c").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    first, second, third = (cache.file_fingerprint(tmp_path / name) for name in names)
    assert first == second != third
