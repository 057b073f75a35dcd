"""Labels in pictures: every script that the system has a font for, and what stands where it has none."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from host import Host
from PIL import Image, ImageDraw, ImageFont

SIZE = 14
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def make_font(path: Path, characters: str) -> None:
    """A font in which each character is a bar of its own height, and a missing one a box."""
    names = {ord(character): f"glyph{number}" for number, character in enumerate(characters)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    glyphs = {}
    for number, name in enumerate([".notdef", *names.values()]):
        pen = TTGlyphPen(None)
        top = 900 if number == 0 else 300 + 100 * number
        for place, point in enumerate(((100, 0), (100, top), (700, top), (700, 0))):
            (pen.moveTo if place == 0 else pen.lineTo)(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900)
    builder.setupPost()
    builder.save(str(path))


@pytest.fixture
def folder(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the system's fonts."""
    monkeypatch.setattr(lettering(host), "font_folders", lambda: [tmp_path / "none", tmp_path])
    return tmp_path


def lettering(host: Host) -> ModuleType:
    return host.pack_module("pictures.lettering")


def drawn(host: Host, text: str) -> np.ndarray:
    """A line as the module draws it."""
    picture = Image.new("L", (200, 24), "white")
    lettering(host).Lettering(SIZE).draw(ImageDraw.Draw(picture), (0, 2), text)
    return np.asarray(picture)


def by_pillow(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """A line drawn with one font, its foot where the module has it."""
    picture = Image.new("L", (200, 24), "white")
    base = 2 + ImageFont.load_default(SIZE).getbbox("A")[3]
    ImageDraw.Draw(picture).text((0, base), text, fill="black", font=font, anchor="ls")
    return np.asarray(picture)


def test_plain_text_needs_no_font(host: Host, folder: Path) -> None:
    """Protects: unaccented labels look as they did, whatever fonts there are."""
    shutil.copy(DEJAVU, folder)
    text = "a red circle, jumping (1.5)!"
    font = ImageFont.load_default(SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert np.array_equal(drawn(host, text), by_pillow(text, font))


@pytest.mark.parametrize("text", ["naïf", "nai\u0308f", "Жук", "Ωmega", "קטן גדול", "قطة صغيرة", "😀"])
def test_another_script(host: Host, folder: Path, text: str) -> None:
    """Protects: what Pillow's own font lacks is drawn with the system's, word by word, right to left too."""
    boxes = drawn(host, text)
    shutil.copy(DEJAVU, folder)
    (folder / "broken.ttf").write_bytes(b"no font")
    found = drawn(host, text)
    composed = text.replace("i\u0308", "ï")
    assert np.array_equal(found, by_pillow(composed, ImageFont.truetype(str(DEJAVU), SIZE)))
    assert not np.array_equal(found, boxes)


def test_mixed_scripts(host: Host, folder: Path) -> None:
    """Protects: words of one label take the fonts that have them, and a word of two scripts takes two."""
    make_font(folder / "cjk.ttf", "绿色")
    make_font(folder / "other.ttf", "圆")
    own = lettering(host).Lettering(SIZE)
    runs = [(part, font.getname()[0]) for part, font in own._runs("a 绿色 circle 绿圆x")]
    assert runs == [
        ("a", "Aileron"),
        (" 绿色", "cjk"),
        (" circle", "Aileron"),
        (" 绿", "cjk"),
        ("圆", "other"),
        ("x", "Aileron"),
    ]


def test_no_font(host: Host, folder: Path) -> None:
    """Protects: without a font a letter stands as its code point, and different words look different."""
    make_font(folder / "LastResort.ttf", "绿")
    assert np.array_equal(drawn(host, "绿"), drawn(host, "U+7EFF "))
    assert not np.array_equal(drawn(host, "绿"), drawn(host, "红"))
    assert not np.array_equal(drawn(host, "👨\u200d👩"), drawn(host, "👨\u200d👧"))


def test_wrapping(host: Host, folder: Path) -> None:
    """Protects: a label keeps to its column, also where its script has no spaces, and quickly."""
    own = lettering(host).Lettering(SIZE)
    assert own.wrap("a label of two lines", 80) == ["a label of", "two lines"]
    make_font(folder / "cjk.ttf", "绿色")
    own, text, begin = lettering(host).Lettering(SIZE), "绿色" * 150, time.perf_counter()
    lines = own.wrap(text, 100)
    assert time.perf_counter() - begin < 3
    assert "".join(lines) == text
    assert all(own.length(line) <= 100 for line in lines)
    assert max(map(len, lines)) * len(lines) < 1.2 * len(text)
    assert own.wrap("", 100) == [""]


def test_compare_shows_labels(host: Host, folder: Path) -> None:
    """Protects: Contact Sheet (labelled) draws the label that the font has."""
    shutil.copy(DEJAVU, folder)
    image = torch.zeros(1, 64, 64, 3)

    def head(label: str) -> torch.Tensor:
        return host.execute("DescEditCompare", images={"image0": image}, labels=label, side=200)[0][0, :20]

    expected = by_pillow("Жук", ImageFont.truetype(str(DEJAVU), SIZE))[:20, :60]
    np.testing.assert_allclose(head("Жук")[:, 6:66, 0].numpy() * 255, expected, atol=0.5)
