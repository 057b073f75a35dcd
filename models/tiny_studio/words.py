"""The few words that the Tiny Studio knows, as tokens of the host's CLIP tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache, lru_cache

import numpy as np
import torch
from comfy.sd1_clip import SDTokenizer

from . import scenes

START, END = 49406, 49407
LENGTH = 32  # longest trained sequence: no caption needs more


@lru_cache(maxsize=1)
def _tokenizer() -> SDTokenizer:
    return SDTokenizer(embedding_size=128)


@cache
def _word_tokens(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().tokenizer(word)["input_ids"][1:-1])


def tokens(text: str) -> list[int]:
    """Token ids with start and end marks, not padded.

    CLIP's byte pairs never join words, so words can be looked up one by one.
    """
    return [START, *(token for word in text.split() for token in _word_tokens(word)), END]


def unknown(text: str, known: Collection[int]) -> list[str]:
    """The words of a text, in order and once each, that need a token which is not in `known`.

    Numbers, such as a prompt's weights, and punctuation do not count.
    """
    found = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return [word for word in found if not set(_word_tokens(word)) <= set(known)]


def vocabulary() -> list[int]:
    """Every token id that a caption can hold, sorted: the rows of the shipped embedding table."""
    rng = np.random.default_rng(0)
    known = {START, END}
    for _ in range(4000):
        scene = scenes.sample_scene(rng)
        known.update(tokens(scenes.caption(scene)))
        known.update(tokens(scenes.caption(scene, scenes.random_named(scene, rng))))
    return sorted(known)


def padded(texts: list[str], rows: dict[int, int]) -> torch.Tensor:
    """Rows of the embedding table for each text, [texts, LENGTH], padded with the end mark as in the host."""
    out = torch.full((len(texts), LENGTH), rows[END])
    for line, text in enumerate(texts):
        known = [rows[token] for token in tokens(text)]
        out[line, : len(known)] = torch.tensor(known)
    return out
