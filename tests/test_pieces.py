"""Finding the words of an edit with T5 and with language models, by the host's own tokenizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from comfy.text_encoders import flux, pixart_t5, sd3_clip
from host import Host
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# Of Mistral's tekken tokenizer: its first special tokens, how it cuts a text, and a few merges.
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
CUT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"
MERGES = ["Ġ f", "o x", "Ġf ox", "Ġ g", "r e", "Ġg re", "Ġgre e", "e n", "o g"]


def _mistral() -> flux.Flux2Tokenizer:
    """The host's tokenizer of Flux.2 dev with a small vocabulary: the real one comes with the weights, and
    the host's reader of it fails with transformers 5.23.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in MERGES)]
    known = [*SPECIAL, "<pad>", *letters, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(known)}, merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(CUT), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([cut, whole]), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    with pytest.MonkeyPatch.context() as patch:
        made = {"tokenizer_object": tokenizer, "legacy": False}
        patch.setattr(flux, "load_mistral_tokenizer", lambda data: made)
        return flux.Flux2Tokenizer()


TOKENIZERS = {
    "Flux.1": flux.FluxTokenizer,
    "Chroma": pixart_t5.PixArtTokenizer,
    "Flux.2 klein": flux.KleinTokenizer,
    "Flux.2 dev": _mistral,
}
LANGUAGE_MODELS = ("qwen3_4b", "mistral3_24b")


class _Clip:
    """What the node needs of the host's CLIP: its tokenizer. And what a token stands for, by transformers."""

    def __init__(self, kind: str) -> None:
        self.tokenizer = TOKENIZERS[kind]()
        self.tokenize = self.tokenizer.tokenize_with_weights
        parts = vars(self.tokenizer)
        self.encoder = next(name for name in ("t5xxl", "clip_t5xxl", *LANGUAGE_MODELS) if name in parts)
        self.own = parts[self.encoder].tokenizer

    def tokens(self, text: str) -> list[int]:
        """What the encoder is given."""
        (chunk,) = self.tokenize(text)[self.encoder.removeprefix("clip_")]
        return [token for token, _ in chunk]

    def text(self, text: str, positions: Any) -> str:
        """What these positions stand for."""
        given = self.tokens(text)
        return self.own.decode([given[position] for position in positions]).strip()


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def clip(request: pytest.FixtureRequest) -> _Clip:
    """Each of the tokenizers."""
    return _Clip(request.param)


def _find(host: Host, clip: Any, source: str, edit: str, words: str = "") -> Any:
    """Run the node."""
    tokens, _ = host.execute(
        "DescEditFindTokens", clip=clip, source_description=source, edit_description=edit, words=words
    )
    return tokens


@pytest.mark.parametrize(
    ("source", "edit", "words"),
    [
        ("a red circle", "a green circle", {"green": "red"}),
        ("A photo of a dog's bowl", "a photo of an armadillo's bowl", {"an": "", "armadillo's": "dog's"}),
        ("a fox, on grass", "a xylophonist, on deep snow", {"xylophonist": "fox", "deep": "", "snow": ""}),
        ("a caf\u00e9 in 2024", "a caf\u00e9 in 2026", {"2026": "2024"}),
        ("a two-tone car", "a three-tone car", {"three": "two"}),
        ("a red fox", "a (green:1.3) fox", {"green": "red"}),
    ],
)
def test_words(host: Host, clip: _Clip, source: str, edit: str, words: dict[str, str]) -> None:
    """Protects: the words that differ are at the positions whose tokens stand for them, and for what they
    replace, in what the encoder is given, template, weights and all.
    """
    found = _find(host, clip, source, edit)
    assert [word.text for word in found.words] == [word for word in words if word != "an"]
    for word in found.words:
        assert clip.text(edit, word.tokens) in (word.text, f"-{word.text}")
        if words[word.text]:
            assert clip.text(source, word.source_tokens) in (words[word.text], f"-{words[word.text]}")


def test_the_description_alone(host: Host, clip: _Clip) -> None:
    """Protects: the description's tokens are all between its template and its marks: they stand for the text,
    and both descriptions' shared tokens for the same.
    """
    source, edit = "a fox, on grass", "a big fox, on wet grass"
    found = _find(host, clip, source, edit)
    for text, length in ((source, found.source_length), (edit, found.edit_length)):
        assert clip.text(text, range(found.start, found.start + length)) == text
    assert len(found.alignment) >= 4
    for own, old in found.alignment:
        assert clip.tokens(edit)[own] == clip.tokens(source)[old]
    assert (found.start > 0) == (clip.encoder in LANGUAGE_MODELS)


def test_named_phrases_and_parts(host: Host, clip: _Clip) -> None:
    """Protects: a phrase is found with all its tokens, wherever it is; and with a language model, which knows
    the letters, a part of a word in a script without spaces, also where a letter is several tokens.
    """
    edit = "two big dogs and a big dog"
    found = _find(host, clip, "a street", edit, "big dog, and")
    assert [clip.text(edit, word.tokens) for word in found.words] == ["big dog", "and"]
    edit = "\u4e00\u53ea\u7eff\u8272\u7684\u72d0\u72f8"
    if clip.encoder in LANGUAGE_MODELS:
        (word,) = _find(host, clip, "a fox", edit, "\u7eff\u8272").words
        assert "\u7eff\u8272" in clip.text(edit, word.tokens)
        if clip.encoder == "mistral3_24b":  # here each letter is cut into three tokens
            assert len(word.tokens) == 6
        assert len(word.tokens) < len(clip.tokens(edit))
    else:
        with pytest.raises(ValueError, match=r"Find Edit Tokens: edit_description has .*t5xxl does not know"):
            _find(host, clip, "a fox", f"{edit} {edit}")


def test_refusals(host: Host, clip: _Clip) -> None:
    """Protects: an embedding, a word that is not there, and text encoders whose words cannot be found are
    refused by name.
    """
    with pytest.raises(ValueError, match=r"edit_description names an embedding, .*text encoder"):
        _find(host, clip, "a fox", "a fox, embedding:thing")
    with pytest.raises(ValueError, match=r"words has 'cat', which is not in edit_description"):
        _find(host, clip, "a fox", "a dog", "cat")
    tokenizer = sd3_clip.SD3Tokenizer()
    other = SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)
    with pytest.raises(ValueError, match=r"clip has the text encoders g, l, t5xxl, .* cannot be found yet"):
        _find(host, other, "a fox", "a dog")
