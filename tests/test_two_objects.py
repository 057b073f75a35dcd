"""The study of two objects: where words look, and what its rows are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host import Host


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    names = ("two_objects", "words_by_layer", "studio")
    return SimpleNamespace(
        **{name: host.pack_module(f"lab.studies.{name}") for name in names},
        layouts=host.pack_module("lab.benchmark.layouts"),
        scenes=host.pack_module("models.tiny_studio.scenes"),
    )


@pytest.fixture(scope="module")
def tiny(lab: Any) -> Any:
    """The studio."""
    return lab.studio.Studio.load()


def test_roc_area(lab: Any) -> None:
    """Protects the page's areas: they are the fraction of ordered pairs, counted one by one, draws as half."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (8, 8), generator=generator).float()
    positive = torch.rand(8, 8, generator=generator) < 0.3
    inside, outside = scores[positive].tolist(), scores[~positive].tolist()
    won = [(high > low) + 0.5 * (high == low) for high in inside for low in outside]
    assert lab.words_by_layer.roc_area(scores, positive, ~positive) == pytest.approx(sum(won) / len(won))


def test_words_have_their_tokens(lab: Any, tiny: Any) -> None:
    """Protects: each word is looked up at its own tokens of the context, and belongs to its own object."""
    tokenizer = tiny.clip.tokenizer.clip_l.tokenizer
    for case in lab.layouts.read_cases("tiny-studio-two", None, "tuning"):
        scene, text = case.drawn.pair.source, case.source_description
        ids = [token for token, _ in tiny.clip.tokenize(text)["l"][0]]
        found = lab.words_by_layer.word_tokens(scene, text)
        assert {("left", "shape"), ("right", "shape"), ("left", "colour"), ("right", "colour")} <= set(found)
        for (side, name), tokens in found.items():
            assert (
                tokenizer.decode([ids[token] for token in tokens]).strip() == scene.values[f"{side}_{name}"]
            )
        left, right = (found[side, "shape"][-1] for side in ("left", "right"))
        assert left < ids.index(tokenizer.encode("and")[1]) < right


def test_where_words_look(lab: Any, tiny: Any) -> None:
    """Protects what the study can show at all: in the shipped model the words of two objects look at their own
    one, in the layers that the studio's word layers are chosen from, and not in the coarsest ones.
    """
    cases = lab.layouts.read_cases("tiny-studio-two", None, "tuning")[:8]
    found = lab.words_by_layer.localisation(tiny, lab.studio.Batch.of(tiny, cases))
    for layer in ("output.3.0", "output.4.0"):
        for name in ("shape", "colour", "texture"):
            rest, other = found[layer, name]
            assert rest > 0.7 and other > 0.75, (layer, name)
    assert found["output.4.0", "colour"][1] > 0.95
    assert abs(found["middle.0.0", "shape"][1] - 0.5) < 0.25


def test_rows(lab: Any) -> None:
    """Protects the comparison: in each table only the two weights differ, and the text alone has neither."""
    tables = lab.two_objects.tables()
    for name, rows in tables.items():
        if name != "noise":
            assert list(rows) == ["text alone", "SAP", "CAA", "both"]
    assert len({method.label for rows in tables.values() for method in rows.values()}) == sum(
        map(len, tables.values())
    )
    weights = {label: (b.beta1 > 0, b.beta2 > 0) for label, b in lab.two_objects.LOSSES.items()}
    assert list(weights.values()) == [(False, False), (True, False), (False, True), (True, True)]
