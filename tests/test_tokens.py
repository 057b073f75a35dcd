"""Finding the words of an edit: DescEditFindTokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
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
    with pytest.raises(Exception, match=r"Find Edit Tokens.*says the same"):
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
    with pytest.raises(Exception, match="Find Edit Tokens: ") as caught:
        find(host, clip, source, edit, words)
    assert message in str(caught.value)


def test_longest_description(host: Host, clip: Any) -> None:
    """Protects: 75 tokens, all that one context holds, are allowed."""
    tokens, _ = find(host, clip, "cat", "dog " * 75)
    assert tokens.edit_length == 75
    assert max(token for word in tokens.words for token in word.tokens) == 75


def words_of(host: Host, clip: Any, source: str, edit: str, words: str = "") -> list[tuple[str, Any, Any]]:
    """What the node finds: text, tokens and source tokens of each word."""
    tokens, _ = find(host, clip, source, edit, words)
    return [(word.text, word.tokens, word.source_tokens) for word in tokens.words]


@pytest.mark.parametrize(
    "edit",
    [
        "a red circle.",
        "a red circle,",
        "A  RED\n\tcircle !?",
        "a [red] circle",
        "((a red)) (circle:1.2)",
        "a {red}, circle;",
        "a red circle ...",
        "a red circle BREAK",
        "a [red:1.2] circle",
        "a red (circle:1.2",
        "a {red : .8} (circle:-1",
        "a red circle <lora:soft_light:0.8>",
        "“a red circle”",
        "a red、circle。",
    ],
)
def test_punctuation_is_no_edit(host: Host, clip: Any, edit: str) -> None:
    """Protects: an edit that changes no word is refused where it is made, with advice."""
    with pytest.raises(Exception, match=r"Find Edit Tokens: .*says the same.*name in words what") as caught:
        find(host, clip, "a red circle", edit)
    assert "describe the image as it should become" in str(caught.value)
    with pytest.raises(Exception, match=r"Find Edit Tokens: .*says the same"):
        find(host, clip, edit, "a red circle")
    circle = find(host, clip, "a red circle", edit, "circle")[0].words[0]
    assert (circle.text, len(circle.tokens), circle.source_tokens) == ("circle", 1, (3,))


def test_punctuation_beside_an_edit(host: Host, clip: Any) -> None:
    """Protects: punctuation is neither a word nor a neighbour, unless it is named; positions count it."""
    assert words_of(host, clip, "a red circle", "a green circle, on sand.") == [
        ("green", (2,), (2,)),
        ("on", (5,), ()),
        ("sand", (6,), ()),
    ]
    assert words_of(host, clip, "a big, red circle", "a red circle") == [("red", (2,), (4,))]
    assert words_of(host, clip, "a red circle", "a , circle") == [("circle", (3,), (3,))]
    assert words_of(host, clip, "a cat", "a cat!", "!") == [("!", (3,), ())]
    assert words_of(host, clip, "a cat", "a cat-like, wooden, chair", "cat-like, wooden; chair") == [
        ("cat-like", (2, 3, 4), (2,)),
        ("wooden; chair", (6, 8), ()),
    ]
    assert [word for word, *_ in words_of(host, clip, "a cat", "a cat <lora:x:1> BREAK break")] == ["break"]


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        ("a 绿色的圆", "绿色的圆"),
        ("a Naïf", "Naïf"),
        ("a nai\u0308f", "nai\u0308f"),
        ("a 😀, (red:0.5)", "😀"),
        ("a 👨‍👩‍👧", "👨‍👩‍👧"),
        ("a ❤️", "❤️"),
        ("a हिन्दी", "हिन्दी"),
        ("a می‌خواهم", "می‌خواهم"),
        ("a קטן", "קטן"),
        ("a \u1112\u1161\u11ab\u1100\u1173\u11af", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
        ("an İstanbul", "İstanbul"),
        ("a (ΣΑΣ:1.3)", "ΣΑΣ"),
        ("a 4K", "4K"),
        ("a 1990s", "1990s"),
    ],
)
def test_shown_as_written(host: Host, clip: Any, edit: str, wanted: str) -> None:
    """Protects: a word in any script is one word, shown as it was written, with all of its tokens; a picture
    of a face is a word too.
    """
    tokens, text = find(host, clip, "a red", edit)
    word = tokens.words[0]
    count = len(clip.tokenizer.clip_l.tokenizer(wanted)["input_ids"]) - 2
    assert (word.text, word.tokens) == (wanted, tuple(range(2, 2 + count)))
    assert text.splitlines()[0].startswith(f"{wanted}: token 2")


def test_curly_apostrophes(host: Host, clip: Any) -> None:
    """Protects: an apostrophe as phones write it makes no word of the letter behind it."""
    assert words_of(host, clip, "a cat's bed", "a dog\u2019s bed") == [("dog", (2,), (2,))]
    with pytest.raises(Exception, match="says the same"):
        find(host, clip, "a cat's bed", "a cat\u2019s bed")
    assert words_of(host, clip, "a cat", "\u2018s\u2019 cat")[0][0] == "s"


def test_emoji_beside_punctuation(host: Host, clip: Any) -> None:
    """Protects: what the tokenizer reads as one with a comma is still the word without it."""
    assert words_of(host, clip, "a red 😀, smiling", "a green 😀 smiling") == [("green", (2,), (2,))]
    found, _ = find(host, clip, "a red 👨‍👩‍👧! cat", "a green 👨‍👩‍👧 cat")
    assert [(word.text, word.tokens) for word in found.words] == [("green", (2,))]
    assert found.alignment == ((1, 1), (7, 7))


def test_naming_in_scripts_without_spaces(host: Host, clip: Any) -> None:
    """Protects: a part of a run of letters can be named where a script has no spaces, and nowhere else."""
    own = clip.tokenizer.clip_l.tokenizer("绿色")["input_ids"][1:-1]
    (word,) = find(host, clip, "一只猫", "绿色的圆", "绿色")[0].words
    assert (word.text, word.tokens) == ("绿色", tuple(range(1, 1 + len(own))))
    both = words_of(host, clip, "一只猫", "绿色的圆，绿色的草", "绿色、草")
    assert [word for word, *_ in both] == ["绿色", "草"]
    assert len(both[0][1]) == 2 * len(own)
    with pytest.raises(Exception, match="'red', which is not in"):
        find(host, clip, "a cat", "a reduced cat", "red")


@pytest.fixture
def inverted(tmp_path: Path) -> Any:
    """A CLIP's tokenizer beside textual inversions of 3, 2 and 1 vectors, and one for another model."""
    generator = torch.Generator().manual_seed(0)
    for name, count, width in (("cat_ti", 3, 768), ("dog_ti", 2, 768), ("one", 1, 768), ("wide", 1, 1024)):
        vectors = torch.randn(count, width, generator=generator)
        safetensors.torch.save_file({"emb_params": vectors}, str(tmp_path / f"{name}.safetensors"))
    return _clip(SD1Tokenizer(embedding_directory=str(tmp_path)))


def test_embeddings(host: Host, inverted: Any) -> None:
    """Protects: an embedding is one word with a token for each of its vectors, and another is another word;
    what stands behind it has the position that the encoder gives it.
    """
    assert words_of(host, inverted, "a embedding:cat_ti in grass", "a embedding:dog_ti in snow") == [
        ("embedding:dog_ti", (2, 3), (2, 3, 4)),
        ("snow", (5,), (6,)),
    ]
    assert words_of(host, inverted, "embedding:cat_ti", "embedding:dog_ti") == [
        ("embedding:dog_ti", (1, 2), (1, 2, 3))
    ]
    assert words_of(host, inverted, "a cat", "a (embedding:one:1.2), cat (embedding:dog_ti)") == [
        ("embedding:one", (2,), ()),
        ("embedding:dog_ti", (5, 6), ()),
    ]
    edit = "embedding:dog_ti embedding:one,\nembedding:dog_ti cat"
    assert words_of(host, inverted, edit, edit, "embedding:dog_ti, embedding:one embedding:dog_ti") == [
        ("embedding:dog_ti", (1, 2, 5, 6), (1, 2, 5, 6)),
        ("embedding:one embedding:dog_ti", (3, 5, 6), (3, 5, 6)),
    ]
    with pytest.raises(Exception, match="says the same"):
        find(host, inverted, "a embedding:cat_ti", "a (embedding:cat_ti:1.4).")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("a embedding:cow_ti", "edit_description names embedding:cow_ti, which ComfyUI does not find"),
        ("a (embedding:cow_ti:1.2)", "names embedding:cow_ti, which"),
        ("embedding:cow_ti embedding:one", "names embedding:cow_ti, which"),
        (
            "a embedding:wide",
            "edit_description has an embedding of width 1024 but this text encoder takes 768",
        ),
        ("a embedding:", "edit_description has embedding: without a name"),
        ("a (embedding:)", "edit_description has embedding: without a name"),
        ("a " + "embedding:cat_ti " * 25, "edit_description has 76 tokens but one context holds 77"),
    ],
)
def test_bad_embeddings(host: Host, inverted: Any, edit: str, message: str) -> None:
    """Protects: an embedding that the host would leave out of the description is named."""
    with pytest.raises(Exception, match="Find Edit Tokens: ") as caught:
        find(host, inverted, "a cat", edit)
    assert message in str(caught.value)
