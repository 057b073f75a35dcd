"""Edit pairs in a folder: pictures, texts and their encoding."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from host import Host
from PIL import Image

SIZE = 64


@pytest.fixture
def folder(host: Host) -> Iterator[Path]:
    """An empty folder inside the host's input folder."""
    path = Path(folder_paths.get_input_directory()) / "pairs"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    assert path.is_relative_to(host.base)
    yield path
    shutil.rmtree(path)


def write_pair(folder: Path, name: str, size: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> None:
    """A pair of random pictures, (width, height), with its texts."""
    rng = np.random.default_rng(seed)
    for role in ("source", "edit"):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}_{role}.png")
    texts = {"source": "a large red circle", "edit": "a large blue circle"}
    (folder / f"{name}.json").write_text(json.dumps(texts), encoding="utf-8")


def encode(host: Host, folder: Path, studio: Any, resolution: int = SIZE) -> Any:
    """EDIT_PAIRS from the node."""
    _, clip, vae = studio
    return host.execute("DescEditEditPairs", vae=vae, clip=clip, folder=folder.name, resolution=resolution)[0]


@pytest.fixture(scope="module")
def studio(host: Host) -> Any:
    """The Tiny Studio's MODEL, CLIP and VAE."""
    return host.execute("DescEditTinyStudio")[:3]


def test_buckets(host: Host) -> None:
    """Protects: sizes are multiples of the step, near the area asked for, from 1:2 to 2:1, portrait and
    landscape.
    """
    found = host.pack_module("training.pairs").buckets(512, 64)
    assert (512, 512) in found
    assert {(width, height) for height, width in found} == set(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.5 <= height / width <= 2
        assert 0.8 <= height * width / 512**2 <= 1.2


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (64, 64)), ((300, 200), (192, 320)), ((150, 310), (384, 192))]
)
def test_pictures_are_fitted(
    host: Host, folder: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Protects: a picture covers its bucket, keeps its proportions and its middle, and one of the bucket's
    own size keeps every pixel.
    """
    pairs = host.pack_module("training.pairs")
    gradient = np.linspace(0, 255, size[0])[None, :, None].repeat(size[1], 0).repeat(3, 2).astype(np.uint8)
    write_pair(folder, "a")
    for role in ("source", "edit"):
        Image.fromarray(gradient).save(folder / f"a_{role}.png")
    (pair,) = pairs.read_folder(folder, 64 if size == (64, 64) else 256, 64)
    assert tuple(pair.source.shape) == (*expected, 3)
    if size == (64, 64):
        np.testing.assert_array_equal((pair.source.numpy() * 255).round(), gradient)
    row = pair.source[expected[0] // 2, :, 0].numpy()
    assert row.mean() == pytest.approx(0.5, abs=0.01)
    assert (np.diff(row) >= -1e-3).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no edit", "there is no b_edit.png"),
        ("sizes", "the source is 64x64 and the edit 96x64"),
        ("tiny", "smaller than 64 pixels"),
        ("broken", "cannot be read"),
        ("sixteen bits", "has I;16 pixels but must have 8 bits per channel"),
        ("no text", 'no "source" and "edit" texts'),
        ("empty text", "a description is empty"),
        ("no json", 'no "source" and "edit" texts'),
    ],
)
def test_bad_pairs(
    host: Host, folder: Path, caplog: pytest.LogCaptureFixture, fault: str, message: str
) -> None:
    """Protects: a pair that cannot be used is named, logged and skipped while it is at most one in a hundred;
    beyond that the folder is refused.
    """
    pairs = host.pack_module("training.pairs")
    for name in ("a", "b", "c"):
        write_pair(folder, name)
    match fault:
        case "no edit":
            (folder / "b_edit.png").unlink()
        case "sizes":
            Image.new("RGB", (96, 64)).save(folder / "b_edit.png")
        case "tiny":
            Image.new("RGB", (32, 64)).save(folder / "b_source.png")
        case "broken":
            (folder / "b_edit.png").write_bytes(b"not a picture")
        case "sixteen bits":
            Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(folder / "b_edit.png")
        case "no text":
            (folder / "b.json").write_text("{}")
        case "empty text":
            (folder / "b.json").write_text('{"source": "a", "edit": " "}')
        case "no json":
            (folder / "b.json").write_text("{")
    assert [pair.name for pair in pairs.read_folder(folder, 64, 64)] == ["a", "c"]
    assert "edit pair b: " in caplog.text
    assert message in caplog.text
    shutil.copy(folder / "b.json", folder / "d.json")
    with pytest.raises(
        ValueError, match=r"2 of 4 edit pairs in pairs cannot be used, more than 1%; the first is b"
    ):
        list(pairs.read_folder(folder, 64, 64))


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_encodings(host: Host, folder: Path, encoding: str) -> None:
    """Protects: texts are read as editors write them, with a byte order mark or without."""
    write_pair(folder, "a")
    texts = {"source": "绿色的圆", "edit": "a naïve blue circle"}
    (folder / "a.json").write_bytes(json.dumps(texts, ensure_ascii=False).encode(encoding))
    (pair,) = host.pack_module("training.pairs").read_folder(folder, 64, 64)
    assert (pair.source_text, pair.edit_text) == tuple(texts.values())


def test_a_text_in_another_encoding(host: Host, folder: Path) -> None:
    """Protects: a text in an unknown encoding is a bad pair that says so, never learned wrong."""
    write_pair(folder, "a")
    (folder / "a.json").write_bytes('{"source": "a naïve", "edit": "b"}'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"the first is a: .*it is not UTF-8 \(.*\): save it as UTF-8"):
        list(host.pack_module("training.pairs").read_folder(folder, 64, 64))


def test_endings_in_capitals(host: Host, folder: Path) -> None:
    """Protects: endings count the same in small letters and capitals, and hidden files are no pairs."""
    for name, image, text in (("a", "PNG", "JSON"), ("b", "JPG", "json"), ("c", "Webp", "Json")):
        for role in ("source", "edit"):
            Image.new("RGB", (64, 64), "red").save(folder / f"{name}_{role}.{image}")
        (folder / f"{name}.{text}").write_text('{"source": "a", "edit": "b"}')
    (folder / "._a.json").write_bytes(b"\x00\x05\x16\x07")
    pairs = list(host.pack_module("training.pairs").read_folder(folder, 64, 64))
    assert [pair.name for pair in pairs] == ["a", "b", "c"]


def hidden(mode: str, colour: int) -> Image.Image:
    """A red square on transparent ground, whose colour there nobody sees."""
    pixels = np.full((64, 64, 4), colour, np.uint8)
    pixels[..., 3] = 0
    pixels[16:48, 16:48] = 255, 0, 0, 255
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        return image
    if mode == "LA":
        return image.convert("LA")
    ground = np.where(pixels[..., 3] == 0, 0, 1).astype(np.uint8)
    if mode == "P":
        found = Image.fromarray(ground, "P")
        found.putpalette([colour, colour, colour, 255, 0, 0])
        found.info["transparency"] = 0
    elif mode == "L":
        found = Image.fromarray(np.where(ground == 0, colour, 77).astype(np.uint8))
        found.info["transparency"] = colour
    else:
        found = image.convert("RGB")
        found.info["transparency"] = (colour, colour, colour)
    return found


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_hidden_colours_are_not_learned(host: Host, folder: Path, mode: str) -> None:
    """Protects: what is transparent, in whatever way a file says so, lies on white; the rest is as it was."""
    pairs = host.pack_module("training.pairs")
    found = []
    for colour in (10, 200):
        write_pair(folder, "a")
        hidden(mode, colour).save(folder / "a_source.png")
        (pair,) = pairs.read_folder(folder, 64, 64)
        found.append(pair.source)
    assert torch.equal(*found)
    assert torch.equal(found[0][0, 0], torch.ones(3))
    seen = 77 if mode == "L" else round(0.299 * 255) if mode == "LA" else None
    expected = torch.full((3,), seen / 255) if seen else torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(found[0][32, 32], expected)


def test_half_transparent(host: Host, folder: Path) -> None:
    """Protects: soft edges are mixed with white."""
    write_pair(folder, "a")
    Image.new("RGBA", (64, 64), (0, 100, 200, 51)).save(folder / "a_source.png")
    (pair,) = host.pack_module("training.pairs").read_folder(folder, 64, 64)
    expected = torch.tensor([255 * 0.8 + value * 0.2 for value in (0, 100, 200)]) / 255
    torch.testing.assert_close(pair.source[5, 5], expected, atol=1 / 255, rtol=0)


def test_turned_by_exif(host: Host, folder: Path) -> None:
    """Protects: a picture that its camera says is turned is learned upright."""
    write_pair(folder, "a")
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255  # bright above; turned by 90 degrees clockwise it is bright on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "a_source.png", exif=exif)
    (pair,) = host.pack_module("training.pairs").read_folder(folder, 64, 64)
    assert pair.source[:, 40:].min() == 1
    assert pair.source[:, :24].max() == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations(host: Host, folder: Path, kind: str) -> None:
    """Protects: an animated file is a bad pair and named, not learned as its first picture."""
    write_pair(folder, "a")
    (folder / "a_source.png").unlink()
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(folder / f"a_source.{kind.lower()}", kind, save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=r"a_source.\w+ is an animation of 2 frames"):
        list(host.pack_module("training.pairs").read_folder(folder, 64, 64))


def test_a_print_picture(host: Host, folder: Path) -> None:
    """Protects: a CMYK picture is learned in its colours."""
    write_pair(folder, "a")
    (folder / "a_source.png").unlink()
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(folder / "a_source.jpg", quality=100)
    (pair,) = host.pack_module("training.pairs").read_folder(folder, 64, 64)
    torch.testing.assert_close(pair.source[5, 5], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)


def test_encoded_once(host: Host, folder: Path, studio: Any) -> None:
    """Protects: pictures are encoded once and again only when they change, and a text that all pairs share
    once; what is on disk is what the encoders give, to fp16; pairs of one size make a batch in the model's
    own scale.
    """
    model, clip, vae = studio
    for name in ("a", "b"):
        write_pair(folder, name, seed=ord(name))
    pairs = encode(host, folder, studio)
    assert pairs.files[0][2:] == pairs.files[1][2:]

    def stamps() -> dict[str, int]:
        return {str(path): os.stat(path).st_mtime_ns for path in pairs.folder.rglob("*.*")}

    before = stamps()
    again = encode(host, folder, studio)
    assert again == pairs
    assert stamps() == before
    write_pair(folder, "b", seed=99)
    changed = encode(host, folder, studio)
    assert changed.files[0] == pairs.files[0]
    assert not set(changed.files[1][:2]) & set(pairs.files[1][:2])
    assert changed.files[1][2:] == pairs.files[1][2:]
    with torch.inference_mode():
        found = pairs.batch([0, 1], torch.device("cpu"), model.model.process_latent_in)
        assert found.source.shape == found.edit.shape == (2, 4, 8, 8)
        with Image.open(folder / "a_source.png") as file:
            source = torch.from_numpy(np.asarray(file, np.float32) / 255)
        fp16: dict[str, Any] = {"rtol": 1 / 2048, "atol": 1e-6}
        torch.testing.assert_close(found.source[:1], 0.18215 * vae.encode(source[None]), **fp16)
        text = clip.encode_from_tokens(clip.tokenize("a large blue circle"), return_pooled=True)
        torch.testing.assert_close(tuple(found.edit_text[0]), text, **fp16)
        white = vae.encode(torch.ones(1, 64, 64, 3))
        torch.testing.assert_close(found.white, 0.18215 * white, **fp16)


@pytest.mark.parametrize(
    ("name", "message"), [("nothing", "folder is 'nothing'"), ("../..", "folder is '../..'")]
)
def test_folders(host: Host, studio: Any, name: str, message: str) -> None:
    """Protects: only a folder inside the input folder is read."""
    _, clip, vae = studio
    with pytest.raises(ValueError, match=f"Edit Pairs from Folder: {message}"):
        host.execute("DescEditEditPairs", vae=vae, clip=clip, folder=name)


def test_an_empty_folder(host: Host, folder: Path, studio: Any) -> None:
    """Protects: a folder without pairs says what it needs."""
    with pytest.raises(
        ValueError, match=r"Edit Pairs from Folder: no edit pairs in pairs: it needs name_source.png"
    ):
        encode(host, folder, studio)
