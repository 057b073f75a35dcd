"""Edit pairs from a folder, shards and data sets, split among processes."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from host import Host
from PIL import Image
from webdataset.writer import TarWriter

KINDS = ("folder", "webdataset", "huggingface")
SIZE = 64


@pytest.fixture(scope="module")
def sources(host: Host) -> Any:
    return host.pack_module("training.sources")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and prepared data sets in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@dataclass
class Drawn:
    """A sample's pictures, as arrays and as the bytes of a file, and texts."""

    name: str
    arrays: tuple[np.ndarray, np.ndarray]
    files: list[bytes]
    texts: list[str]


def draw(count: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[Drawn]:
    """Samples of random pictures, (width, height)."""
    rng = np.random.default_rng(5)
    found = []
    for number in range(count):
        first, second = (rng.integers(0, 256, (size[1], size[0], 3), np.uint8) for _ in range(2))
        files = []
        for array in (first, second):
            file = io.BytesIO()
            Image.fromarray(array).save(file, "png")
            files.append(file.getvalue())
        texts = [f"a red circle, number {number}", f"a blüe circle, number {number}"]
        found.append(Drawn(f"pair{number:04d}", (first, second), files, texts))
    return found


def write(kind: str, folder: Path, samples: list[Drawn], per_shard: int = 3) -> dict[str, Any]:
    """The samples on disk; returns the DataConfig's kind and path."""
    folder.mkdir(exist_ok=True)
    if kind == "folder":
        for sample in samples:
            for role, content in zip(("source", "edit"), sample.files, strict=True):
                (folder / f"{sample.name}_{role}.png").write_bytes(content)
            texts = dict(zip(("source", "edit"), sample.texts, strict=True))
            (folder / f"{sample.name}.json").write_text(json.dumps(texts), encoding="utf-8")
        return {"kind": kind, "path": str(folder)}
    if kind == "webdataset":
        shards = range(0, len(samples), per_shard)
        for number, first in enumerate(shards):
            with TarWriter(str(folder / f"{number:03d}.tar")) as shard:
                for sample in samples[first : first + per_shard]:
                    texts = dict(zip(("source", "edit"), sample.texts, strict=True))
                    names = {"source.png": sample.files[0], "edit.png": sample.files[1], "json": texts}
                    shard.write({"__key__": sample.name, **names})
        return {"kind": kind, "path": f"{folder}/{{000..{len(shards) - 1:03d}}}.tar"}
    write_parquet(folder / "pairs.parquet", samples)
    return {"kind": kind, "path": f"{folder}/*.parquet"}


ROLES = ("source_image", "edit_image", "source_text", "edit_text")


def write_parquet(path: Path, samples: list[Drawn], names: tuple[str, ...] = ROLES) -> None:
    """A parquet file as a data set of the hub has it."""
    columns: list[list[Any]] = [
        *([{"bytes": sample.files[place], "path": None} for sample in samples] for place in range(2)),
        *([sample.texts[place] for sample in samples] for place in range(2)),
    ]
    columns.append(list(range(len(samples))))
    pyarrow.parquet.write_table(pyarrow.table(dict(zip((*names, "other"), columns, strict=True))), path)


def check(pairs: list[Any], samples: list[Drawn]) -> None:
    """The pairs are the samples, pixel for pixel."""
    assert len(pairs) == len(samples)
    for pair, sample in zip(pairs, samples, strict=True):
        assert [pair.source_text, pair.edit_text] == sample.texts
        for picture, array in zip((pair.source, pair.edit), sample.arrays, strict=True):
            np.testing.assert_array_equal(picture.numpy(), array.astype(np.float32) / 255)


@pytest.mark.parametrize(
    "kind", [*KINDS, "prepared", "folder of parquet", "columns of bytes", "folder of images"]
)
def test_the_same_pairs(sources: Any, tmp_path: Path, kind: str) -> None:
    """Protects: the same pictures and texts come out of a folder, shards and data sets, streamed or prepared,
    in their order, and `limit` takes the first.
    """
    samples = draw(7)
    where = write(kind if kind in KINDS else "huggingface", tmp_path / "data", samples)
    if kind == "prepared":
        where["streaming"] = False
    elif kind == "folder of parquet":
        where["path"] = str(tmp_path / "data")
    elif kind == "folder of images":
        where["path"] = str(tmp_path / "images")
        (tmp_path / "images" / "train").mkdir(parents=True)
        rows = []
        for sample in samples:
            row = dict(zip(ROLES[2:], sample.texts, strict=True))
            for role, content in zip(ROLES[:2], sample.files, strict=True):
                name = f"{sample.name}.{role}.png"
                (tmp_path / "images" / "train" / name).write_bytes(content)
                row[role.replace("image", "image_file_name")] = name
            rows.append(json.dumps(row) + "\n")
        (tmp_path / "images" / "train" / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    elif kind == "columns of bytes":
        columns = zip(*((*sample.files, *sample.texts) for sample in samples), strict=True)
        table = pyarrow.table({name: list(column) for name, column in zip(ROLES, columns, strict=True)})
        pyarrow.parquet.write_table(table, tmp_path / "data" / "pairs.parquet")
    data = sources.DataConfig(**where, resolution=SIZE)
    pairs = list(sources.read_pairs(data))
    check(pairs, samples)
    hub = where["kind"] == "huggingface"
    assert [pair.name for pair in pairs] == [
        f"row {number}" if hub else sample.name for number, sample in enumerate(samples)
    ]
    check(list(sources.read_pairs(replace(data, limit=4))), samples[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_colours(sources: Any, tmp_path: Path, kind: str) -> None:
    """Protects: no source lets a colour be learned that is transparent in the picture."""
    (sample,) = draw(1)
    pixels = np.dstack([sample.arrays[0], np.full((SIZE, SIZE), 255, np.uint8)])
    pixels[:32, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    sample.files[0] = file.getvalue()
    (pair,) = sources.read_pairs(
        sources.DataConfig(**write(kind, tmp_path / "data", [sample]), resolution=SIZE)
    )
    assert bool((pair.source[:32] == 1).all())
    np.testing.assert_array_equal(pair.source[32:].numpy(), sample.arrays[0][32:].astype(np.float32) / 255)


def test_members_in_capitals_and_with_marks(sources: Any, tmp_path: Path) -> None:
    """Protects: members of a shard count the same in small letters and capitals, and their texts may begin
    with a byte order mark.
    """
    (sample,) = draw(1)
    texts = json.dumps(dict(zip(("source", "edit"), sample.texts, strict=True)))
    content = {"SOURCE.PNG": sample.files[0], "Edit.Png": sample.files[1]}
    content["JSON"] = texts.encode("utf-8-sig")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(f"pair.{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    columns = {"source_image": "Source.PNG"}
    for given in ({}, columns):
        data = sources.DataConfig(str(tmp_path / "0.tar"), "webdataset", columns=given, resolution=SIZE)
        check(list(sources.read_pairs(data)), [sample])


@pytest.mark.parametrize("kind", KINDS)
def test_buckets(sources: Any, tmp_path: Path, kind: str) -> None:
    """Protects: pictures of all sources are brought to the bucket of their shape."""
    where = write(kind, tmp_path / "data", draw(1, (300, 200)))
    (pair,) = sources.read_pairs(sources.DataConfig(**where, resolution=256))
    assert pair.source.shape == pair.edit.shape == (192, 320, 3)


def test_the_shipped_example(sources: Any, tmp_path: Path) -> None:
    """Protects: the UltraEdit configuration reads a data set with UltraEdit's columns."""
    path = Path(sources.__file__).with_name("configs") / "ultraedit.yaml"
    data = sources.DataConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))["data"])
    assert (data.kind, data.path) == ("huggingface", "BleachNick/UltraEdit_500k")
    samples = draw(2, (512, 512))
    write_parquet(
        tmp_path / "a.parquet", samples, ("source_image", "edited_image", "source_caption", "target_caption")
    )
    check(list(sources.read_pairs(replace(data, path=str(tmp_path / "a.parquet")))), samples)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_processes(sources: Any, tmp_path: Path, kind: str) -> None:
    """Protects: processes split the samples without gap or overlap, and none decodes another's pictures."""
    samples = draw(8)
    where = write(kind, tmp_path / "data", samples)
    data = sources.DataConfig(**where, resolution=SIZE)
    for rank in range(3):
        reading = sources.read_pairs(data, (rank, 3))
        check(list(reading), samples[rank::3])
        assert reading.numbers == list(range(rank, 8, 3))
    with pytest.raises(ValueError, match="shard is 3 of 3"):
        sources.read_pairs(data, (3, 3))
    samples[1].files[0] = b"not a picture"
    write(kind, tmp_path / "data", samples)
    for rank, bad in ((0, []), (1, [1])):
        reading = sources.read_pairs(data, (rank, 3))
        list(reading)
        assert [number for number, _ in reading.bad] == bad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["broken", "tiny", "sizes", "no text"])
def test_bad_samples(
    sources: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, fault: str
) -> None:
    """Protects: a bad sample is counted, logged with its key and skipped in every source, and more than 1% of
    them stop.
    """
    samples = draw(4)
    for number in (1, 3):
        match fault:
            case "broken":
                samples[number].files[1] = samples[number].files[1][:-300]
            case "tiny":
                samples[number].files = draw(1, (32, 32))[0].files
            case "sizes":
                samples[number].files[1] = draw(1, (96, 64))[0].files[0]
            case "no text":
                samples[number].texts[1] = " "
    where = write(kind, tmp_path / "data", samples)
    data = sources.DataConfig(**where, resolution=SIZE, limit=3)
    check(list(sources.read_pairs(data)), [samples[0], samples[2]])
    key = "row 1" if kind == "huggingface" else "pair0001"
    assert f"edit pair {key}: " in caplog.text
    with pytest.raises(ValueError, match=f"2 of 4 edit pairs in .* cannot be used, more than 1%; .* {key}: "):
        list(sources.read_pairs(replace(data, limit=0)))


def stream(host: Host, bad: list[bool]) -> Any:
    """A reading of samples whose number nobody knows."""
    pairs = host.pack_module("training.pairs")
    picture = pairs.Picture("picture", lambda: Image.new("RGB", (SIZE, SIZE)))
    texts = (" " if fault else "text" for fault in bad)
    samples = (
        pairs.Sample(str(number), partial(pairs.Parts, picture, picture, text, text))
        for number, text in enumerate(texts)
    )
    return pairs.Reading("stream", samples, SIZE, SIZE)


def test_bad_samples_of_a_stream(host: Host) -> None:
    """Protects: ten bad samples at the beginning do not stop a stream of a thousand, an eleventh does at
    once, and a short one is judged when it ends.
    """
    assert len(list(stream(host, [True] * 10 + [False] * 990))) == 990
    reading = stream(host, [True] * 20)
    with pytest.raises(ValueError, match="11 of 11 edit pairs in stream"):
        list(reading)
    assert reading.seen == 11
    reading = stream(host, [True] * 2 + [False] * 100)
    with pytest.raises(ValueError, match="2 of 102 edit pairs in stream"):
        list(reading)
    assert reading.seen == 102
    assert len(list(stream(host, [True] * 2 + [False] * 198))) == 198


def damage(shard: Path, how: str) -> None:
    """Spoil the second of a shard's three samples, or all of it."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        second = next(member.offset for member in tar if member.name.startswith("pair0001"))
    match how:
        case "cut in a picture":
            content = content[: second + 5000]
        case "cut between files":
            content = content[:second]
        case "header":
            content[second + 100 : second + 200] = b"x" * 100
        case "empty":
            content = bytearray()
        case "compressed":
            content = bytearray(gzip.compress(content))
    shard.write_bytes(content)


@pytest.mark.parametrize("how", ["cut in a picture", "cut between files", "header", "empty", "compressed"])
def test_a_damaged_shard(sources: Any, tmp_path: Path, how: str) -> None:
    """Protects: no shard loses samples without a word: the error names the shard and the place."""
    data = sources.DataConfig(**write("webdataset", tmp_path / "data", draw(6)), resolution=SIZE)
    damage(tmp_path / "data" / "000.tar", how)
    after = "its beginning" if how in ("empty", "compressed") else "(its beginning|sample pair0000)"
    with pytest.raises(ValueError, match=rf"the shard .*000\.tar is damaged after {after} .*: 1 of 2 shards"):
        list(sources.read_pairs(data))


def test_a_damaged_shard_of_many(sources: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Protects: one damaged shard in a hundred is logged and left out, by every process alike."""
    samples = draw(100)
    data = sources.DataConfig(**write("webdataset", tmp_path / "data", samples, 1), resolution=SIZE)
    (tmp_path / "data" / "050.tar").write_bytes(b"x" * 700)
    check(list(sources.read_pairs(data)), samples[:50] + samples[51:])
    assert "050.tar is damaged after its beginning" in caplog.text
    check(list(sources.read_pairs(data, (1, 2))), (samples[:50] + samples[51:])[1::2])


def test_members_of_shards(sources: Any, tmp_path: Path) -> None:
    """Protects: `columns` says which members of a shard are what, with alternatives and texts apart."""
    samples = draw(2)
    with TarWriter(str(tmp_path / "a.tar")) as shard:
        for sample, first in zip(samples, ("before.png", "before.webp"), strict=True):
            members = {first: sample.files[0], "after.png": sample.files[1], "old.txt": sample.texts[0]}
            shard.write({"__key__": f"deep/{sample.name}", **members, "more.json": {"new": sample.texts[1]}})
    columns = {
        "source_image": "before.png;before.webp",
        "edit_image": "after.png",
        "source_text": "old.txt",
        "edit_text": "more.json:new",
    }
    data = sources.DataConfig(str(tmp_path / "a.tar"), "webdataset", columns=columns, resolution=SIZE)
    check(list(sources.read_pairs(data)), samples)
    with pytest.raises(ValueError, match=r"deep/pair0000: there is no deep/pair0000.source.png"):
        list(sources.read_pairs(replace(data, columns={})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "zip"}, "kind\n.*'folder', 'webdataset' or 'huggingface'.*'zip'"),
        ({"path": ""}, "path\n.* at least 1 item"),
        ({"path": ["a", "b"]}, "path is \\['a', 'b'\\]"),
        ({"columns": {"edit_text": "a"}}, "columns are for webdataset and huggingface"),
        ({"kind": "webdataset", "columns": {"text": "a"}}, "columns.text.*\n.*'source_image', .*'text'"),
        ({"step": 12}, "step\n.*a multiple of 8.*12"),
        ({"resolution": 32}, "resolution is 32"),
        ({"limit": -1}, "limit\n.*greater than or equal to 0.*-1"),
    ],
)
def test_wrong_settings(sources: Any, settings: dict[str, Any], message: str) -> None:
    """Protects: settings that cannot be are refused by name."""
    with pytest.raises(ValueError, match=message):
        sources.DataConfig(**{"path": "pairs", **settings})


def test_data_that_is_not_there(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: missing files, columns, data sets and libraries are said; a path is never run as a command,
    and a data set's script neither.
    """
    where = write("webdataset", tmp_path / "data", draw(3))
    made = tmp_path / "made"
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text(f"open({str(made)!r}, 'w')")
    write("huggingface", tmp_path / "rows", draw(1))
    rows = {"kind": "huggingface", "path": f"{tmp_path}/rows/*.parquet"}
    for settings, message in [
        ({"path": str(tmp_path / "nothing")}, "there is no folder .*nothing"),
        ({**where, "path": f"{tmp_path}/data/{{000..002}}.tar"}, r"there is no file .*001\.tar and 1 more"),
        ({**where, "path": f"{tmp_path}/*.tar"}, r"there is no file .*\*\.tar"),
        ({**where, "path": f"pipe:touch {made}"}, "there is no file pipe:"),
        ({"kind": "huggingface", "path": str(scripted)}, "scripted cannot be opened"),
        ({"kind": "huggingface", "path": "nobody/nothing"}, "nobody/nothing cannot be opened"),
        ({**rows, "columns": {"edit_text": "target"}}, "has no column target but source_image, "),
    ]:
        with pytest.raises(ValueError, match=message):
            list(sources.read_pairs(sources.DataConfig(**settings)))
    assert not made.exists()
    (tmp_path / "rows" / "pairs.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"the data set .* cannot be (opened|read)"):
        list(sources.read_pairs(sources.DataConfig(**rows)))
    for kind, module in (("huggingface", "datasets"), ("webdataset", "webdataset.tariterators")):
        monkeypatch.setitem(sys.modules, module, None)
        library = module.partition(".")[0]
        with pytest.raises(ImportError, match=rf"needs the library {library}: .* -m pip install -r"):
            list(sources.read_pairs(sources.DataConfig(**{**where, "kind": kind})))
