"""Which tokens of the edit description carry the edit, as positions in the context that the UNet sees."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

NODE = "DescEditFindTokens"
ARTICLES = frozenset(("a", "an", "the"))


@dataclass(frozen=True)
class EditWord:
    """One word or phrase of the edit description.

    tokens: its positions in the context, the start mark being 0. source_tokens: positions in the source
    description's context of what it replaces or repeats; empty if nothing there corresponds.
    """

    text: str
    tokens: tuple[int, ...]
    source_tokens: tuple[int, ...]


@dataclass(frozen=True)
class EditTokens:
    """EDIT_TOKENS: the words that carry the edit, and how the two descriptions lie beside each other.

    edit_length, source_length: tokens between start and end mark. alignment: pairs (edit position, source
    position) of the tokens that both descriptions share.
    """

    words: tuple[EditWord, ...]
    edit_length: int
    source_length: int
    alignment: tuple[tuple[int, int], ...]
    note: str = ""

    def describe(self) -> str:
        """The words and their positions, one a line, for people."""
        lines = []
        for word in self.words:
            line = f"{word.text}: token {_listing(word.tokens)}"
            lines.append(line + (f" (source: {_listing(word.source_tokens)})" if word.source_tokens else ""))
        return "\n".join([*lines, self.note] if self.note else lines)


@dataclass(frozen=True)
class _Word:
    text: str
    tokens: tuple[int, ...]


def find_tokens(clip: Any, source: str, edit: str, words: str = "") -> EditTokens:
    """Find the edit's tokens: the words of `edit` that are not in `source`, or the given ones.

    If `edit` only leaves words out, the words that stood beside them are taken, and the result says so.

    clip: the host's CLIP of an SD1.5, SD2.x or SDXL model. words: separated by commas, phrases allowed; all
    occurrences count. Prompt weights such as "(red:1.3)" may stand in any of the texts.

    Raises ValueError for an empty description, descriptions of the same words, a description longer than one
    context, and a word that is not in the edit description.
    """
    source_words = _words(clip, source, "source_description")
    edit_words = _words(clip, edit, "edit_description")
    source_texts = [word.text for word in source_words]
    edit_texts = [word.text for word in edit_words]
    if source_texts == edit_texts:
        raise ValueError(
            f"{NODE}: edit_description says the same as source_description ({edit.strip()!r}): "
            "describe the image as it should become"
        )
    partners: dict[int, tuple[int, ...]] = {}
    changed: list[int] = []
    alignment: list[tuple[int, int]] = []
    gaps: list[int] = []
    matcher = SequenceMatcher(None, source_texts, edit_texts, autojunk=False)
    for kind, low, high, start, end in matcher.get_opcodes():
        if kind == "equal":
            pairs = zip(edit_words[start:end], source_words[low:high], strict=True)
            alignment += [match for new, old in pairs for match in zip(new.tokens, old.tokens, strict=True)]
        else:
            changed += range(start, end)
            gaps += [start] if kind == "delete" else []
        one_to_one = end - start == high - low
        for offset in range(end - start):
            old = source_words[low + offset : low + offset + 1] if one_to_one else source_words[low:high]
            partners[start + offset] = tuple(token for word in old for token in word.tokens)

    note = ""
    if words.strip():
        groups = [
            (phrase.strip(), _occurrences(clip, phrase, edit_texts, edit)) for phrase in words.split(",")
        ]
    else:
        telling = _telling(changed, edit_texts)
        if not telling:
            telling = _beside(gaps, edit_texts)
            note = "(edit_description only leaves words out: these stand beside them)"
        groups = [(edit_texts[place], [place]) for place in telling]
    return EditTokens(
        words=tuple(
            EditWord(
                text,
                tuple(token for place in places for token in edit_words[place].tokens),
                tuple(dict.fromkeys(token for place in places for token in partners[place])),
            )
            for text, places in groups
        ),
        edit_length=sum(len(word.tokens) for word in edit_words),
        source_length=sum(len(word.tokens) for word in source_words),
        alignment=tuple(alignment),
        note=note,
    )


def _telling(places: list[int], texts: list[str]) -> list[int]:
    """The places that say something: no punctuation, and no articles unless there is nothing else."""
    spoken = [place for place in places if _spoken(texts[place])]
    return [place for place in spoken if texts[place] not in ARTICLES] or spoken


def _beside(gaps: list[int], texts: list[str]) -> list[int]:
    """For each gap, the next word that says something, or else the last one before it."""
    spoken = _telling(list(range(len(texts))), texts)
    return sorted({next((place for place in spoken if place >= gap), spoken[-1]) for gap in gaps})


def _words(clip: Any, text: str, name: str) -> list[_Word]:
    """The words of a description as its CLIP tokenizer cuts them, lower case and without prompt weights."""
    if not text.strip():
        raise ValueError(f"{NODE}: {name} is empty: describe the image")
    by_encoder = clip.tokenize(text, return_word_ids=True)
    chunks = by_encoder.get("l") or next(iter(by_encoder.values()))
    if len(chunks) > 1:
        count = sum(word_id != 0 for chunk in chunks for _, _, word_id in chunk)
        raise ValueError(
            f"{NODE}: {name} has {count} tokens but one context holds {len(chunks[0])} "
            f"with its start and end mark: shorten it"
        )
    words, piece, start = [], "", 1
    for position, (token, weight, word_id) in enumerate(chunks[0]):
        if word_id == 0:
            continue
        if not isinstance(token, int):
            words.append(_Word("embedding", (position,)))
            piece, start = "", position + 1
            continue
        ((_, part),) = clip.tokenizer.untokenize([(token, weight)])
        piece += part
        if part.endswith("</w>"):
            words.append(_Word(piece.removesuffix("</w>"), tuple(range(start, position + 1))))
            piece, start = "", position + 1
    if not any(_spoken(word.text) for word in words):
        raise ValueError(f"{NODE}: {name} {text!r} holds no word: describe the image")
    return words


def _occurrences(clip: Any, phrase: str, edit_texts: list[str], edit: str) -> list[int]:
    wanted = [word.text for word in _words(clip, phrase, "words")] if phrase.strip() else []
    starts = [
        place
        for place in range(len(edit_texts))
        if wanted and edit_texts[place : place + len(wanted)] == wanted
    ]
    if not starts:
        raise ValueError(
            f"{NODE}: words has {phrase.strip()!r}, which is not in edit_description {edit.strip()!r}: "
            "use words from it, separated by commas"
        )
    return [start + offset for start in starts for offset in range(len(wanted))]


def _spoken(text: str) -> bool:
    return any(letter.isalnum() for letter in text)


def _listing(tokens: tuple[int, ...]) -> str:
    return ", ".join(str(token) for token in tokens)
