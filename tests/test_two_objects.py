"""The study of two objects: where words look, and what its rows are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host import Host


@pytest.fixture(scope="module")
def lab(host: Host) -> Any:
    """The modules."""
    names = ("publish", "study", "studio", "two_objects", "words_by_layer")
    return SimpleNamespace(
        **{name: host.pack_module(f"lab.studies.{name}") for name in names},
        results=host.pack_module("lab.benchmark.results"),
        layouts=host.pack_module("lab.benchmark.layouts"),
        scenes=host.pack_module("models.tiny_studio.scenes"),
    )


@pytest.fixture(scope="module")
def tiny(lab: Any) -> Any:
    """The studio."""
    return lab.studio.Studio.load()


def test_roc_area(lab: Any) -> None:
    """Protects the page's areas: they are the fraction of ordered pairs, a draw counting half."""
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
    """Protects what the study can show at all: in two layers of the shipped model the words of two objects
    look at their own one; in the coarsest they do not.
    """
    cases = lab.layouts.read_cases("tiny-studio-two", None, "tuning")[:8]
    found = lab.words_by_layer.localisation(tiny, lab.studio.Batch.of(tiny, cases), ["output.4.0"])
    heads = [sum(found[f"output.4.0 head {number}", "colour"]) for number in range(4)]
    assert min(heads) < sum(found["output.4.0", "colour"]) - 0.1  # one is worse than the mean of all
    for layer in ("output.3.0", "output.4.0"):
        for name in ("shape", "colour", "texture"):
            rest, other = found[layer, name]
            assert rest > 0.7, (layer, name)
            assert other > 0.75, (layer, name)
    assert found["output.4.0", "colour"][1] > 0.95
    assert abs(found["middle.0.0", "shape"][1] - 0.5) < 0.25


def test_rows(lab: Any) -> None:
    """Protects the comparison: in each table only the two weights differ, and the text alone has neither."""
    tables = lab.two_objects.tables()
    for name, rows in tables.items():
        if name != "noise":
            assert [label.partition(", ")[2] for label in rows] == ["both", "SAP", "CAA", "text alone"] * 4
    assert len({method.label for rows in tables.values() for method in rows.values()}) == sum(
        map(len, tables.values())
    )
    weights = {label: (b.beta1 > 0, b.beta2 > 0) for label, b in lab.two_objects.LOSSES.items()}
    assert list(weights.values()) == [(True, True), (True, False), (False, True), (False, False)]


def test_page(lab: Any, tiny: Any, tmp_path: Path) -> None:
    """Protects: the page holds the stored means, and its verdicts follow from them, case by case."""
    cases = lab.layouts.read_cases(lab.two_objects.LAYOUT, None, "test")[:6]
    tables = lab.two_objects.tables()
    study, tuning = (
        lab.study.Study(tiny, cases, split, {lab.two_objects.PLAN.name: tables}, tmp_path / "rows")
        for split in ("test", "tuning")
    )
    for label, method in tables["methods"].items():
        asked = float(label.endswith(("both", "CAA")))
        metrics = {"success": 1 - asked, "asked": asked, "leaked": 0.5, "target_psnr": 20.0, "structure": 1.0}
        results = [lab.results.new_result(method, case, 1.0, metrics) for case in cases]
        study.store.add(method, results, [1.0], "a card")
    metrics, page = lab.publish.publish(study, tuning, lab.two_objects.PLAN, tmp_path)
    assert metrics["asked_CAA"] == metrics["asked_both"] == metrics["success_SAP"] == 1
    assert metrics["leaked_text_alone"] == 0.5
    assert "| CFG 2, SAP | 100.0% | 0.0% | 50.0% | 20.00 |" in page
    assert "| CAA makes the text take hold: beside SAP | **holds** |" in page
    assert "| Both losses together are better than either | **does not hold** |" in page
    assert "{" not in page
    assert page.count("| `output.4.0` |") == 1
