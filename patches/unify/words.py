"""The edit's words as weights over the positions of a context, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tokens import EditTokens


@dataclass(frozen=True, eq=False)
class Words:
    """The words of each row of a batch.

    tokens: [rows or 1, words, context], 1 at each word's tokens.
    description: [rows or 1, context], 1 at the description's own tokens: not marks, a template or padding.
    weights: [rows or 1, words], each word's weight in its row, which sum to 1; 0 for padding in a row that
    has fewer words than another, and all 0 for a row without words.
    """

    tokens: torch.Tensor
    description: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> Words:
        return Words(self.tokens.to(device), self.description.to(device), self.weights.to(device))


def edit_words(rows: Sequence[EditTokens], context: int, offset: int = 0) -> Words:
    """Each row's edit words in a context of `context` positions.

    offset: of the encoder's output in it.

    Raises ValueError for a row without words and for a position that is not in the context.
    """
    for tokens in rows:
        if not tokens.words or not all(word.tokens for word in tokens.words):
            raise ValueError("edit_tokens has no words: find the words of the edit first")
    words = [[word.tokens for word in tokens.words] for tokens in rows]
    return _words(
        words,
        [(offset + tokens.start, tokens.edit_length) for tokens in rows],
        (context, offset),
        "edit_tokens",
        "the guider's positive conditioning",
        "edit",
    )


def source_words(rows: Sequence[EditTokens], context: int, offset: int = 0) -> Words:
    """The source description's words that each row's edit words replace or repeat; words without a
    counterpart are left out.

    Raises ValueError for a position that is not in the context.
    """
    words = [[word.source_tokens for word in tokens.words if word.source_tokens] for tokens in rows]
    return _words(
        words,
        [(offset + tokens.start, tokens.source_length) for tokens in rows],
        (context, offset),
        "edit_tokens (of the source description)",
        "the inversion's conditioning",
        "source",
    )


def _words(
    rows: list[list[tuple[int, ...]]],
    descriptions: list[tuple[int, int]],
    place: tuple[int, int],
    name: str,
    conditioning: str,
    description: str,
) -> Words:
    context, offset = place
    most = max(1, *map(len, rows))
    found = Words(
        torch.zeros(len(rows), most, context),
        torch.zeros(len(rows), context),
        torch.zeros(len(rows), most),
    )
    for row, (words, (start, length)) in enumerate(zip(rows, descriptions, strict=True)):
        # Padding repeats a word, so that losses stay finite; its weight 0 removes it.
        padding = [words[0]] * (most - len(words)) if words else []
        for number, word in enumerate([*words, *padding]):
            for token in (offset + token for token in word):
                if not start <= token < context:
                    raise ValueError(
                        f"{name} has token {token - offset} but {conditioning} has {context} tokens: encode "
                        f"the {description} description that the tokens were found in"
                    )
                found.tokens[row, number, token] = 1
            found.weights[row, number] = 1 / len(words) if number < len(words) else 0
        found.description[row, start : start + length] = 1
    return found
