"""Splits a description into words, each with its tokens and its original spelling."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, compress, groupby
from typing import Any

import torch

from .pieces import BYTES, own_pieces, places, plain, shares, text_of, words_in

# As the host finds them: at the beginning, behind a space, or behind the brackets of a prompt weight.
_EMBEDDING = re.compile(r"(?<![^\s()])embedding:\s*((?:\\[()]|[^\s<\[()])*)")
_WEIGHT = re.compile(r":[-+.\d]+$")
# Marks of other programs that the host encodes as text, among them weights that it does not read.
_SYNTAX = re.compile(r"<[A-Za-z]+:[^<>]*>|\bBREAK\b|(?<=:)\s*[-+]?\d*\.?\d+(?=\s*[)\]}])")
_OPEN_WEIGHT = re.compile(r"[(\[{][^()\[\]{}:,]*:(\s*[-+]?\d*\.?\d+)(?=\s*(?:,|$))")
_APOSTROPHE, _ENDINGS = "\u2019", ("s", "t", "re", "ve", "m", "ll", "d")
_JOINERS = "\u200c\u200d"
# The host's names of CLIP's text encoders, and of those that give a DiT its text, T5 with CLIP beside it.
_CLIP = {"l", "g", "h"}
_PIECES = {"t5xxl", "qwen3_4b", "qwen3_8b", "mistral3_24b"}


@dataclass(frozen=True)
class Word:
    """One word of a description.

    key: equal for the same word elsewhere.
    text: as written.
    tokens: its positions in what the text encoder gives, counted from 0.
    is_word: whether it has content, unlike punctuation and the marks of other programs.
    span: its position in the text, if known.
    sizes: the tokens' parts of `key`, in bytes; an embedding has none.
    """

    key: str
    text: str
    tokens: tuple[int, ...]
    is_word: bool
    span: tuple[int, int] | None = None
    embedding: bool = False
    sizes: tuple[int, ...] = ()

    def part(self, text: str) -> Word | None:
        """The tokens of the first occurrence of `text`, as a word, in this word; None if there is none."""
        wanted = text.encode()
        begin = self.key.encode().find(wanted)
        if begin < 0:
            return None
        ends = accumulate(self.sizes)
        bounds = zip(ends, self.sizes, strict=True)
        inside = [end > begin and end - size < begin + len(wanted) for end, size in bounds]
        return replace(self, key=text, text=text, tokens=tuple(compress(self.tokens, inside)), sizes=())


def read_words(name: str, clip: Any, text: str) -> list[Word]:
    """The words of a description; each token belongs to exactly one of them.

    Consecutive letters, digits and accents are one word, whatever the tokenizer makes of them. A
    textual-inversion embedding is one word, different from any other embedding. Prompt weights and their
    brackets belong to no word.

    clip: the host's CLIP of an SD1.5, SD2.x, SDXL, Flux.1, Flux.2 or Chroma model.

    Raises ValueError, naming the input, for an empty text, more than one context, an embedding that the host
    would leave out, letters that a text encoder does not know, and other text encoders.
    """
    if not text.strip():
        raise ValueError(f"{name} is empty: describe the image")
    encoders = [*clip.tokenize("")]
    if not set(encoders) <= _CLIP:
        return _read_pieces(name, clip, encoders, text)
    mentions = _mentions(name, clip, text)
    by_encoder = clip.tokenize(text, return_word_ids=True)
    chunks = by_encoder.get("l") or next(iter(by_encoder.values()))
    if len(chunks) > 1:
        count = sum(word_id != 0 for chunk in chunks for _, _, word_id in chunk)
        raise ValueError(
            f"{name} has {count} tokens but one context holds {len(chunks[0])} "
            "with its start and end mark: shorten it"
        )
    _check_embeddings(name, clip, by_encoder)
    words = [*_cut(clip, chunks[0])]
    found = [word.key for word in words if word.embedding]
    for number, mention in enumerate(mentions):
        if number >= len(found) or found[number] != mention.key:
            raise ValueError(
                f"{name} names {mention.text}, which ComfyUI does not find: put the file into "
                "models/embeddings, write a weight as (embedding:name:1.2), or leave it out"
            )
    spelling = _Spelling(text)
    return _joined([spelling.find(word, mentions) for word in words], text)


def _read_pieces(name: str, clip: Any, encoders: list[str], text: str) -> list[Word]:
    """The words of a description for T5 or a language model."""
    found = [encoder for encoder in encoders if encoder in _PIECES]
    if len(found) != 1 or not set(encoders) <= {*found, "l"}:
        raise ValueError(
            f"clip has the text encoders {', '.join(encoders)}, whose words cannot be found yet: use those "
            "of SD1.x, SD2.x, SDXL, Flux.1, Flux.2 or Chroma"
        )
    if _EMBEDDING.search(text):
        raise ValueError(
            f"{name} names an embedding, beside which words cannot be found with the text encoder "
            f"{found[0]}: leave it out"
        )
    (chunk,) = clip.tokenize(text, return_word_ids=True)[found[0]]
    own = own_pieces(clip, found[0], chunk)
    syntax = _syntax(text)

    def says(text: str, index: int) -> bool:
        return _says(text[index]) and not any(low <= index < high for low, high in syntax)

    spans = places([text_of(clip, found[0], token) for _, token in own], text, says)
    words, read = [*words_in(text, says)], []
    for (span, is_word), parts in zip(words, shares(spans, [span for span, _ in words]), strict=True):
        written = text[slice(*span)]
        if is_word and not parts:
            raise ValueError(
                f"{name} has {written!r}, of which the text encoder {found[0]} does not know the letters: "
                "write it in another way"
            )
        tokens = tuple(own[number][0] for number, _ in parts)
        sizes = tuple(
            size
            for part, tokens_of in groupby(part for _, part in parts)
            for size in _divided(len(plain(text[slice(*part)]).encode()), len([*tokens_of]))
        )
        read += [Word(plain(written), written, tokens, is_word, span, sizes=sizes)] if parts else []
    return read


def _divided(size: int, tokens: int) -> list[int]:
    """The bytes of each of the tokens that one character is cut into, which lie in the same place."""
    return [size * (n + 1) // tokens - size * n // tokens for n in range(tokens)]


def _syntax(text: str) -> list[tuple[int, int]]:
    """Where a text has marks of other programs."""
    found = [match.span() for match in _SYNTAX.finditer(text)]
    return found + [match.span(1) for match in _OPEN_WEIGHT.finditer(text)]


def says_something(text: str) -> bool:
    """Whether `text` has a letter, a digit or a symbol such as an emoji."""
    return any(map(_says, text))


def without_spaces(text: str) -> bool:
    """Whether `text` has only caseless letters, such as Chinese ones, which need no spaces."""
    return all(unicodedata.category(character) in ("Lo", "Lm", "Mn", "Mc") for character in text)


def _says(character: str) -> bool:
    category = unicodedata.category(character)
    beyond = category in ("Sk", "Cf") and ord(character) > 0xFFFF  # skin tones and flags
    return (
        category[0] in "LNM"
        or (category == "So" and character != "\ufffd")
        or beyond
        or character in _JOINERS
    )


def _cut(clip: Any, chunk: list[tuple[Any, float, int]]) -> Iterator[Word]:
    """The tokenizer's own words; those with punctuation are split where a token ends."""
    pieces: list[tuple[int, bytes]] = []
    vectors: list[tuple[int, torch.Tensor]] = []
    last = 0
    for position, (token, weight, word_id) in enumerate([*chunk, (0, 1.0, 0)]):
        if word_id != last:
            yield from _runs(pieces)
            if vectors:
                tokens, tensors = zip(*vectors, strict=True)
                yield Word(_digest(tensors), "embedding", tokens, is_word=True, embedding=True)
            pieces, vectors, last = [], [], word_id
        if word_id == 0:
            continue
        if isinstance(token, torch.Tensor):
            vectors.append((position, token))
            continue
        ((_, part),) = clip.tokenizer.untokenize([(token, weight)])
        pieces.append((position, bytes(BYTES[letter] for letter in part.removesuffix("</w>"))))
        if part.endswith("</w>"):
            yield from _runs(pieces)
            pieces = []


def _runs(pieces: list[tuple[int, bytes]]) -> Iterator[Word]:
    """One of the tokenizer's words, split between tokens with content and tokens without."""
    text = b"".join(part for _, part in pieces).decode("utf-8", "replace")
    begins, offset = {}, 0
    for character in text:
        begins[offset] = character
        offset += len(character.encode())
    runs: list[tuple[str, list[int], bool]] = []
    offset = 0
    for position, part in pieces:
        here = "".join(begins.get(byte, "") for byte in range(offset, offset + len(part)))
        offset += len(part)
        is_word = says_something(here)
        if runs and (not here or runs[-1][2] == is_word):
            before, tokens, is_word = runs.pop()
            runs.append((before + here, [*tokens, position], is_word))
        else:
            runs.append((here, [position], is_word))
    sizes = {position: len(part) for position, part in pieces}
    for key, tokens, is_word in runs:
        yield Word(key, key, tuple(tokens), is_word, sizes=tuple(sizes[token] for token in tokens))


def _digest(vectors: Iterable[torch.Tensor]) -> str:
    """Identifies an embedding."""
    parts = [vector.detach().to(device="cpu", dtype=torch.float32).contiguous() for vector in vectors]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def _mentions(name: str, clip: Any, text: str) -> list[Word]:
    """The embeddings named in a text, in order, without tokens; none if the tokenizer has none."""
    found = []
    for match in _EMBEDDING.finditer(text):
        written = _WEIGHT.sub("", match[1]).strip(",")
        if not written:
            raise ValueError(f"{name} has embedding: without a name: write embedding:name")
        chunks = next(iter(clip.tokenize(f"embedding:{written}", return_word_ids=True).values()))
        alone = [token for chunk in chunks for token, _, word_id in chunk if word_id != 0]
        if alone and not isinstance(alone[0], torch.Tensor):
            continue
        start = match.start()
        span = start, match.start(1) + len(written)
        found.append(Word(_digest(alone), f"embedding:{written}", (), True, span, True))
    return found


def _check_embeddings(name: str, clip: Any, by_encoder: dict[str, Any]) -> None:
    """Raise ValueError for vectors that the host would leave out, which would shift the tokens behind
    them.
    """
    for encoder, chunks in by_encoder.items():
        wanted = getattr(getattr(clip.tokenizer, f"clip_{encoder}", None), "embedding_size", None)
        vectors = (token for chunk in chunks for token, *_ in chunk if isinstance(token, torch.Tensor))
        widths = {vector.shape[-1] for vector in vectors}
        if wanted is not None and widths - {wanted}:
            raise ValueError(
                f"{name} has an embedding of width {max(widths - {wanted})} but this text encoder "
                f"takes {wanted}: use one that was made for this model"
            )


class _Spelling:
    """Finds words, one after the other, in the text that they were read from."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._mention = text, 0, 0
        self._plain, self._starts, self._ends = "", [], []
        for cluster in re.finditer(r"(?s).[\u0300-\u036f\u0653-\u0655\u1160-\u11ff\u3099\u309a]*", text):
            plain = unicodedata.normalize("NFC", cluster[0]).lower()
            self._plain += plain
            self._starts += [cluster.start()] * len(plain)
            self._ends += [cluster.end()] * len(plain)
        self._syntax = _syntax(text)

    def find(self, word: Word, mentions: list[Word]) -> Word:
        """The spelling of `word`. A word inside a mark of another program has no content."""
        if word.embedding:
            if self._mention == len(mentions):
                return word
            written = mentions[self._mention]
            assert written.span is not None
            self._mention += 1
            self._at = bisect_left(self._starts, written.span[1])
            return replace(written, tokens=word.tokens)
        index = self._plain.find(word.key, self._at)
        if index < 0 or not word.key:
            return word
        self._at = index + len(word.key)
        start, end = self._starts[index], self._ends[self._at - 1]
        is_word = word.is_word and not any(low <= start and end <= high for low, high in self._syntax)
        return replace(word, text=self._text[start:end], span=(start, end), is_word=is_word)


def _joined(words: list[Word], text: str) -> list[Word]:
    """Merges tokenizer words that are written as one word.

    These are digits, what follows an accent, and the endings that the tokenizer recognises behind a straight
    apostrophe only.
    """
    found: list[Word] = []
    for word in words:
        if found and (_continues(found[-1], word) or _is_ending(found[-1], word)):
            before = found.pop()
            assert before.span is not None
            assert word.span is not None
            span = before.span[0], word.span[1]
            key = before.key.replace(_APOSTROPHE, "'") + word.key
            tokens, sizes = before.tokens + word.tokens, before.sizes + word.sizes
            word = Word(key, text[slice(*span)], tokens, word.is_word, span, sizes=sizes)
        found.append(word)
    return found


def _is_ending(before: Word, word: Word) -> bool:
    return (
        before.key == _APOSTROPHE
        and word.key in _ENDINGS
        and before.span is not None
        and word.span is not None
        and before.span[1] == word.span[0]
    )


def _continues(before: Word, word: Word) -> bool:
    if before.embedding or word.embedding or before.span is None or word.span is None:
        return False
    begins = unicodedata.category(word.key[0])[0] in "LNM" or word.key[0] in _JOINERS
    together = word.span[0] <= before.span[1] and before.is_word == word.is_word
    return together and begins and any(map(str.isalnum, before.key))
