"""Splits a description into words for text encoders that cut a text into pieces: T5 and language models.

Words are found in the text itself, and each token belongs to the word that it lies in. The host gives
language models a template around the text, whose tokens belong to no word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# GPT-2's alphabet writes each byte as one letter: printable ones are themselves.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_HIDDEN)}
_ENDING = re.compile(r"['\u2019](?:s|t|re|ve|m|ll|d)(?!\w)", re.IGNORECASE)
_SPACE, _UNKNOWN = "\u2581", "<unk>"  # in T5's vocabulary

Span = tuple[int, int]


def own_pieces(clip: Any, encoder: str, chunk: Sequence[tuple[Any, float, int]]) -> list[tuple[int, Any]]:
    """The description's own tokens, without template, marks and padding: positions and tokens.

    chunk: what the host's tokenizer gives for the description, with word ids.
    """
    (empty,) = clip.tokenize("", return_word_ids=True)[encoder]
    around = [token for token, _, word in empty if word]
    own = [(position, token) for position, (token, _, word) in enumerate(chunk) if word]
    before = next((n for n, token in enumerate(around) if n == len(own) or own[n][1] != token), len(around))
    return own[before : len(own) - (len(around) - before)]


def text_of(clip: Any, encoder: str, token: Any) -> bytes | None:
    """The text of a token, with a space in front where it begins a word; None if it stands for anything."""
    tokenizer = getattr(clip.tokenizer, encoder, None) or getattr(clip.tokenizer, f"clip_{encoder}")
    ((_, piece),) = tokenizer.untokenize([(token, 1.0)])
    if encoder.startswith("t5"):
        return None if piece == _UNKNOWN else piece.replace(_SPACE, " ").encode()
    return bytes(BYTES[letter] for letter in piece) if BYTES.keys() >= set(piece) else None


def places(pieces: Sequence[bytes | None], text: str, says: Callable[[str, int], bool]) -> list[Span]:
    """Where each token lies in the text; a space lies nowhere, at the place that it is before.

    says: whether the text's character at an index has content. Only what has none can lie between tokens: the
    host takes prompt weights out. Tokens that are not the text's own letters, since T5 does not know these or
    writes them in another way, lie between the others.
    """
    found: list[Span] = [(0, 0)] * len(pieces)
    at, unknown, held, letters = 0, [], [], b""
    for number, piece in enumerate(pieces):
        held.append(number)
        letters += piece or b""
        try:
            part = letters.decode().strip()
        except UnicodeDecodeError:
            continue  # the rest of the character follows
        index = text.find(part, at) if part else at
        skipped = any(says(text, between) for between in range(at, index))
        if piece is None or index < 0 or (unknown and not part) or (skipped and not unknown):
            unknown += held
        else:
            found = [(at, index) if n in unknown else span for n, span in enumerate(found)]
            at = index + len(part)
            found = [(index, at) if n in held else span for n, span in enumerate(found)]
            unknown = []
        held, letters = [], b""
    return [(at, len(text)) if n in {*unknown, *held} else span for n, span in enumerate(found)]


def words_in(text: str, says: Callable[[str, int], bool]) -> Iterator[tuple[Span, bool]]:
    """The words of a text and whether they have content: consecutive characters of one kind, and with a word
    its ending behind an apostrophe.
    """
    start = 0
    while start < len(text):
        if text[start].isspace():
            start += 1
            continue
        content, end = says(text, start), start + 1
        while end < len(text) and not text[end].isspace() and says(text, end) == content:
            end += 1
        ending = _ENDING.match(text, end) if content else None
        end = ending.end() if ending else end
        yield (start, end), content
        start = end


def shares(spans: Sequence[Span], words: Sequence[Span]) -> list[list[tuple[int, Span]]]:
    """For each word its tokens, with the part of the word that each covers. A token belongs to the word that
    it covers most of; what covers none, as a space, belongs to the next token's word, or else to the last.
    """
    found: list[list[tuple[int, Span]]] = [[] for _ in words]
    best = len(words) - 1
    for token in range(len(spans) - 1, -1, -1):
        start, end = spans[token]
        covered = [(max(start, low), min(end, high)) for low, high in words]
        most = max(range(len(words)), key=[high - low for low, high in covered].__getitem__)
        low, high = covered[most]
        best = most if high > low else best
        found[best].insert(0, (token, (low, max(low, high))))
    return found


def plain(text: str) -> str:
    """A word as it is compared: accents composed, lower case, straight apostrophes."""
    return unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
