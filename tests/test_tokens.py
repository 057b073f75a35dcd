"""Finding the words of an edit: DescEditFindTokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from host import Host

START_MARK = 1


@pytest.fixture(scope="module")
def clip() -> Any:
    """What the node needs of the host's CLIP: its own tokenizer."""
    return _clip(SD1Tokenizer())


def _clip(tokenizer: Any) -> Any:
    return SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)


def find(host: Host, clip: Any, source: str, edit: str, words: str = "") -> tuple[Any, str]:
    """Run the node."""
    return host.execute(
        "DescEditFindTokens", clip=clip, source_description=source, edit_description=edit, words=words
    )


def expected(clip: Any, text: str, word: str) -> tuple[int, ...]:
    """Positions of `word` in `text`, by tokenizing what stands before it and the word alone."""
    tokenizer = clip.tokenizer.clip_l.tokenizer
    before = tokenizer(text[: text.index(word)].strip())["input_ids"][1:-1]
    own = tokenizer(word)["input_ids"][1:-1]
    return tuple(range(START_MARK + len(before), START_MARK + len(before) + len(own)))


def test_changed_word(host: Host, clip: Any) -> None:
    """Protects: by default the word that differs, and the word it replaces."""
    tokens, text = find(host, clip, "a red circle", "a green circle")
    (word,) = tokens.words
    assert (word.text, word.tokens, word.source_tokens) == ("green", (2,), (2,))
    assert (tokens.edit_length, tokens.source_length) == (3, 3)
    assert tokens.alignment == ((1, 1), (3, 3))
    assert text == "green: token 2 (source: 2)"


def test_multi_token_words_and_different_lengths(host: Host, clip: Any) -> None:
    """Protects: a word of several tokens is kept whole, and what follows it stays aligned."""
    source, edit = "a dog on grass", "a xylophonist on grass"
    tokens, _ = find(host, clip, source, edit)
    (word,) = tokens.words
    assert word.tokens == expected(clip, edit, "xylophonist")
    assert len(word.tokens) > 1
    shift = len(word.tokens) - 1
    assert tokens.alignment == ((1, 1), (3 + shift, 3), (4 + shift, 4))


def test_prompt_weights(host: Host, clip: Any) -> None:
    """Protects: positions are those of the text without its weight syntax, and weights alone are no edit."""
    plain, _ = find(host, clip, "a red circle", "a green circle on sand")
    weighted, _ = find(host, clip, "a (red:0.8) circle", "a (green:1.3) circle on (sand)", "green, sand")
    assert [word.tokens for word in plain.words] == [(2,), (4,), (5,)]
    assert [word.tokens for word in weighted.words] == [(2,), (5,)]
    with pytest.raises(Exception, match=r"DescEditFindTokens.*says the same"):
        find(host, clip, "a red circle", "a (red:1.3) circle")


def test_named_words(host: Host, clip: Any) -> None:
    """Protects: named words and phrases win over the difference, in any case, all occurrences counted."""
    edit = "a red cat beside a red wooden chair"
    tokens, _ = find(host, clip, "a cat beside a chair", edit, "RED, wooden chair")
    assert [word.text for word in tokens.words] == ["RED", "wooden chair"]
    assert [word.tokens for word in tokens.words] == [(2, 6), (7, 8)]


def test_articles_are_not_the_edit(host: Host, clip: Any) -> None:
    """Protects: 'a' that had to become 'an' does not count among the words of the edit."""
    tokens, _ = find(host, clip, "a cat", "an owl")
    assert [word.text for word in tokens.words] == ["owl"]


@pytest.mark.parametrize(
    ("source", "edit", "word"),
    [
        ("a face with no glasses", "a face with glasses", "glasses"),
        ("a striped red circle", "a red circle", "red"),
        ("a cat with a hat", "a cat", "cat"),
    ],
)
def test_words_left_out(host: Host, clip: Any, source: str, edit: str, word: str) -> None:
    """Protects: where words only disappear, the one beside them stands for the edit, and the text says so."""
    tokens, text = find(host, clip, source, edit)
    assert [found.text for found in tokens.words] == [word]
    assert text.endswith("only leaves words out: these stand beside them)")


def test_sdxl_tokenizer(host: Host) -> None:
    """Protects: a text encoder with two tokenizers gives the same positions."""
    tokens, _ = find(host, _clip(SDXLTokenizer()), "a red circle", "a green circle")
    assert tokens.words[0].tokens == (2,)


@pytest.mark.parametrize(
    ("source", "edit", "words", "message"),
    [
        ("", "a cat", "", "source_description is empty"),
        ("a cat", " \n", "", "edit_description is empty"),
        ("a cat", "...!", "", "edit_description '...!' holds no word"),
        ("a cat", "A  Cat", "", "says the same as source_description"),
        ("a cat", "a dog", "cow", "'cow', which is not in edit_description 'a dog'"),
        ("a cat", "a dog", "dog,", "words has ''"),
        ("a cat", "dog " * 76, "", "edit_description has 76 tokens but one context holds 77"),
        ("cat " * 200, "a dog", "", "source_description has 200 tokens"),
    ],
)
def test_bad_input(host: Host, clip: Any, source: str, edit: str, words: str, message: str) -> None:
    """Protects: each bad input is refused with the node's name and what to do."""
    with pytest.raises(Exception, match="DescEditFindTokens: ") as caught:
        find(host, clip, source, edit, words)
    assert message in str(caught.value)


def test_longest_description(host: Host, clip: Any) -> None:
    """Protects: 75 tokens, all that one context holds, are allowed."""
    tokens, _ = find(host, clip, "cat", "dog " * 75)
    assert tokens.edit_length == 75
    assert max(token for word in tokens.words for token in word.tokens) == 75
