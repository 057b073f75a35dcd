"""Draws text in every script for which this computer has a font.

Pillow's own font has unaccented Latin letters only. Other characters are drawn with the system's fonts. A
character without a font is written as its code point, such as U+7EFF; a box would not identify it.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

# Plain fonts of many scripts, best first; all others follow.
_PREFERRED = (
    *("dejavusans", "notosans", "segoeui", "arial", "helvetica", "msyh", "yugoth", "malgun", "pingfang"),
    *(
        "hiragino",
        "applesdgothic",
        "droidsansfallback",
        "wqy",
        "sourcehan",
        "notoemoji",
        "seguiemj",
        "symbola",
    ),
)
_STYLED = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif")
_EMPTY = ("lastresort", "adobeblank")  # these have a box or nothing for every character
_NOTHING = "\U0010ffff"  # never a character, so it is drawn as the font's sign for a missing one
_Font = ImageFont.FreeTypeFont


class _Face:
    """A font: `font` to draw with, and whether it `has` characters. `has` measures without a layout engine,
    which would put circles below lone accents.
    """

    def __init__(self, font: _Font) -> None:
        self.font, self._plain = font, font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        self._nothing = self._drawn(_NOTHING)

    def has(self, text: str) -> bool:
        return all(self._drawn(character) != self._nothing for character in text if not _is_silent(character))

    def _drawn(self, character: str) -> tuple[tuple[int, int], bytes]:
        mask: Any = self._plain.getmask(character)
        return mask.size, bytes(mask)


class Lettering:
    """Draws lines of text at one size."""

    def __init__(self, size: int) -> None:
        own = ImageFont.load_default(size)
        assert isinstance(own, ImageFont.FreeTypeFont)  # as for every size that is given
        self._own = own
        self._faces, self._others = [_Face(self._own)], _system_faces(size)
        self.height = self._own.getbbox("A")[3]
        self._known: dict[str, list[tuple[str, _Font]]] = {}

    def length(self, text: str) -> float:
        """The width of a line in pixels."""
        return sum(font.getlength(part) for part, font in self._runs(text))

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
        """Draw a line in black; place: its left and top."""
        x, y = place
        base = y + self.height
        for part, font in self._runs(text):
            pen.text((x, base), part, fill="black", font=font, anchor="ls")
            x += font.getlength(part)

    def wrap(self, text: str, width: float) -> list[str]:
        """`text` in lines of at most `width` pixels, broken at spaces, or inside of a word that is longer."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if not lines[-1] or self.length(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
            while self.length(lines[-1]) > width and (cut := self._cut(lines[-1], width)):
                lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
        return lines

    def _cut(self, line: str, width: float) -> int:
        """Where to break a line so that its head fits, not before an accent; 0 for nowhere."""
        found = 0
        for place in range(1, len(line)):
            if unicodedata.category(line[place])[0] != "M" and "\u200d" not in line[place - 1 : place + 1]:
                if found and self.length(line[:place]) > width:
                    break
                found = place
        return found

    def _runs(self, text: str) -> list[tuple[str, _Font]]:
        """Parts of a line, each with its font."""
        parts: list[tuple[str, _Font]] = []
        for number, word in enumerate(unicodedata.normalize("NFC", text).split(" ")):
            if word not in self._known:
                self._known[word] = self._word(word)
            found = self._known[word] or [("", self._own)]
            parts += [(" " + found[0][0] if number else found[0][0], found[0][1]), *found[1:]]
        grouped = groupby(parts, key=lambda part: part[1])
        return [("".join(part for part, _ in group), font) for font, group in grouped]

    def _word(self, word: str) -> list[tuple[str, _Font]]:
        if font := self._font_for(word):
            return [(word, font)]
        found = []
        for character in word:
            if not _is_silent(character):
                font = self._font_for(character)
                found.append((character, font) if font else (f"U+{ord(character):04X} ", self._own))
        return found

    def _font_for(self, text: str) -> _Font | None:
        """The first font that has every character of `text`; fonts are opened until one does."""
        for face in self._faces:
            if face.has(text):
                return face.font
        lacking = [character for character in text if not self._faces[0].has(character)]
        for face in self._others:
            if any(map(face.has, lacking)):
                self._faces.append(face)
                if face.has(text):
                    return face.font
        return None


def font_folders() -> list[Path]:
    """Where this system keeps its fonts."""
    home, environment = Path.home(), os.environ
    if sys.platform == "win32":
        windows, local = environment.get("WINDIR", r"C:\Windows"), environment.get("LOCALAPPDATA", "")
        return [Path(windows) / "Fonts", *([Path(local) / "Microsoft/Windows/Fonts"] if local else [])]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    data = [environment.get("XDG_DATA_HOME") or str(home / ".local/share")]
    data += (environment.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    return [*(Path(folder) / "fonts" for folder in data), home / ".fonts"]


def _system_faces(size: int) -> Iterator[_Face]:
    """The system's scalable fonts, opened one by one, plain ones of many scripts first."""
    paths = {
        Path(folder) / name
        for top in font_folders()
        for folder, _, names in os.walk(top)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc"))
    }
    for path in sorted(paths, key=_rank):
        if not path.name.lower().startswith(_EMPTY):
            try:
                yield _Face(ImageFont.truetype(str(path), size))
            except OSError:  # a broken file, or pictures of another size
                continue


def _rank(path: Path) -> tuple[bool, int, str]:
    name = path.stem.lower().replace("-", "").replace(" ", "")
    known = (number for number, start in enumerate(_PREFERRED) if name.startswith(start))
    return any(style in name for style in _STYLED), next(known, len(_PREFERRED)), str(path)


def _is_silent(character: str) -> bool:
    """Whether a character has no shape of its own: spaces, joiners, variation selectors."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zs") or "\ufe00" <= character <= "\ufe0f"
