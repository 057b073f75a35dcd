"""Finds the tokens of the edit description that carry the edit, as positions in the text encoder's output."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from .description import Word, read_words, without_spaces

ARTICLES = frozenset(("a", "an", "the"))
_COMMAS = re.compile("[,\uff0c\u3001\u060c]")


@dataclass(frozen=True)
class EditWord:
    """One word or phrase of the edit description.

    tokens: its positions in what the text encoder gives, counted from 0.
    source_tokens: those of what it replaces or repeats in the source description; empty if there is no
    counterpart.
    """

    text: str
    tokens: tuple[int, ...]
    source_tokens: tuple[int, ...]


@dataclass(frozen=True)
class EditTokens:
    """EDIT_TOKENS: the words that carry the edit, and the alignment of the two descriptions.

    edit_length, source_length: tokens of each description, without marks and template.
    alignment: pairs (edit position, source position) of the tokens that both descriptions share.
    start: position of both descriptions' first token: 1 behind CLIP's start mark, 0 with T5, and behind the
    template that language models are given.
    """

    words: tuple[EditWord, ...]
    edit_length: int
    source_length: int
    alignment: tuple[tuple[int, int], ...]
    note: str = ""
    start: int = 1

    def describe(self) -> str:
        """The words and their positions as text, one per line."""
        lines = []
        for word in self.words:
            line = f"{word.text}: token {_listing(word.tokens)}"
            lines.append(line + (f" (source: {_listing(word.source_tokens)})" if word.source_tokens else ""))
        return "\n".join([*lines, self.note] if self.note else lines)


def find_tokens(clip: Any, source: str, edit: str, words: str = "") -> EditTokens:
    """Find the edit's tokens: the words of `edit` that are not in `source`, or the given ones.

    If `edit` only removes words, their neighbours are taken, and the result says so. Punctuation, case,
    spaces and prompt weights such as "(red:1.3)" do not count.

    clip: as in `read_words`.
    words: separated by commas, phrases allowed; all occurrences count.

    Raises ValueError for an empty description, descriptions with the same words if none are named, a
    description longer than one context, a missing embedding, and a word that is not in the edit description.
    """
    all_source, all_edit = (_read(clip, source, "source_description"), _read(clip, edit, "edit_description"))
    source_words, edit_words = _words_only(all_source), _words_only(all_edit)
    source_keys, edit_keys = _keys(source_words), _keys(edit_words)
    if source_keys == edit_keys and not words.strip():
        raise ValueError(
            f"edit_description says the same as source_description ({edit.strip()!r}; punctuation, "
            "case and weights do not count): describe the image as it should become, or name in words what "
            "carries the edit"
        )
    changed: list[Word] = []
    gaps: list[int] = []
    partners: dict[Word, tuple[int, ...]] = {}
    for kind, low, high, start, end in _differences(source_keys, edit_keys):
        changed += edit_words[start:end] if kind != "equal" else []
        gaps += [start] if kind == "delete" else []
        for offset, word in enumerate(edit_words[start:end]):
            one_to_one = end - start == high - low
            old = source_words[low + offset : low + offset + 1] if one_to_one else source_words[low:high]
            partners[word] = tuple(token for word in old for token in word.tokens)
    alignment: list[tuple[int, int]] = []
    for kind, low, high, start, end in _differences(_keys(all_source), _keys(all_edit)):
        pairs = zip(all_edit[start:end], all_source[low:high], strict=True) if kind == "equal" else ()
        for new, old in pairs:
            if len(new.tokens) == len(old.tokens):  # punctuation beside it can change how a word is cut
                alignment += zip(new.tokens, old.tokens, strict=True)

    start = min(token for word in (*all_source, *all_edit) for token in word.tokens)
    note = ""
    if words.strip():
        phrases = _COMMAS.split(words)
        groups = [(phrase.strip(), _occurrences(clip, phrase, all_edit, edit)) for phrase in phrases]
    else:
        chosen = _content_words(changed)
        if not chosen:
            chosen = _neighbours(gaps, edit_words)
            note = "(edit_description only leaves words out: these stand beside them)"
        groups = [(word.text, [word]) for word in chosen]
    return EditTokens(
        words=tuple(
            EditWord(
                text,
                tuple(token for word in found for token in word.tokens),
                tuple(dict.fromkeys(token for word in found for token in partners.get(word, ()))),
            )
            for text, found in groups
        ),
        edit_length=sum(len(word.tokens) for word in all_edit),
        source_length=sum(len(word.tokens) for word in all_source),
        alignment=tuple(alignment),
        note=note,
        start=start,
    )


def _read(clip: Any, text: str, name: str) -> list[Word]:
    """The words of a description, punctuation included; at least one of them has content."""
    found = read_words(name, clip, text)
    if not _words_only(found):
        raise ValueError(f"{name} {text!r} holds no word: describe the image")
    return found


def _keys(words: list[Word]) -> list[str]:
    return [word.key for word in words]


def _words_only(words: list[Word]) -> list[Word]:
    return [word for word in words if word.is_word]


def _differences(source: list[str], edit: list[str]) -> Sequence[tuple[str, int, int, int, int]]:
    return SequenceMatcher(None, source, edit, autojunk=False).get_opcodes()


def _content_words(words: list[Word]) -> list[Word]:
    """`words` without articles, unless there is nothing else."""
    return [word for word in words if word.key not in ARTICLES] or words


def _neighbours(gaps: list[int], words: list[Word]) -> list[Word]:
    """For each gap, the next word that is not an article, or else the last one before it."""
    content = _content_words(words)
    indices = [index for index, word in enumerate(words) if word in content]
    found = sorted({next((index for index in indices if index >= gap), indices[-1]) for gap in gaps})
    return [words[index] for index in found]


def _occurrences(clip: Any, phrase: str, there: list[Word], edit: str) -> list[Word]:
    """The words of `there` that `phrase` names.

    Matched with its punctuation, or without if there is no match; in scripts without spaces also a part of a
    word.
    """
    wanted = read_words("words", clip, phrase) if phrase.strip() else []
    for sought, words in ((wanted, there), (_words_only(wanted), _words_only(there))):
        size = len(sought)
        starts = [
            start
            for start in range(len(words))
            if size and _keys(words[start : start + size]) == _keys(sought)
        ]
        if starts:
            return [word for start in starts for word in words[start : start + size]]
    if len(wanted) == 1 and without_spaces(wanted[0].key):
        parts = [part for word in there if (part := word.part(wanted[0].key))]
        if parts:
            return parts
    raise ValueError(
        f"words has {phrase.strip()!r}, which is not in edit_description {edit.strip()!r}: "
        "use words from it, separated by commas"
    )


def _listing(tokens: tuple[int, ...]) -> str:
    return ", ".join(str(token) for token in tokens)
