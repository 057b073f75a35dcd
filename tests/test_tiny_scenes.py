"""The drawn world measures everything else: its captions, masks and held-out combinations must hold."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def scenes(host: Any) -> ModuleType:
    return host.pack_module("models.tiny_studio.scenes")


EDITS = [
    (kind, wording)
    for kind in ("colour", "texture", "object", "background", "style", "face")
    for wording in ("simple", "complex")
]


@pytest.mark.parametrize(("edit_type", "wording"), EDITS)
def test_an_edit_changes_only_what_it_says(scenes: ModuleType, edit_type: str, wording: str) -> None:
    """Protects the truth of the pairs: one attribute changes, only inside the mask, and the texts say so."""
    for seed in range(25):
        pair = scenes.sample_edit(edit_type, seed, wording, held=seed % 2 == 0)
        assert len(pair.changed) == 1
        before, after = pair.source.draw(), pair.target.draw()
        changed = np.abs(before - after).max(axis=-1)
        assert changed.max() > 0.1
        mask = pair.mask()
        if edit_type == "style":
            assert mask is None
        else:
            assert set(np.unique(mask)) <= {0.0, 1.0}
            assert changed[mask == 0].max() < 1e-5
            assert mask.mean() < 0.97
        assert pair.source_text != pair.edit_text
        new_words = set(pair.edit_text.split()) - set(pair.source_text.split())
        assert new_words, "an edit description must bring a word of its own"


def test_a_seed_draws_the_same_pixels_twice(scenes: ModuleType) -> None:
    """Protects determinism: benchmarks compare pictures drawn at different times."""
    first, second = (scenes.sample_edit("object", 7, "complex", held=True) for _ in range(2))
    assert first == second
    assert np.array_equal(first.source.draw(), second.source.draw())
    assert scenes.sample_edit("object", 8, "complex", held=True) != first


def test_pictures_are_in_range_and_antialiased(scenes: ModuleType) -> None:
    """Protects the picture format: float32, 128x128x3, 0..1, with edges that are not all-or-nothing."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        picture = scenes.sample_scene(rng).draw()
        assert picture.shape == (128, 128, 3)
        assert picture.dtype == np.float32
        assert 0.0 <= picture.min() <= picture.max() <= 1.0
    values = {**{k: v[0] for k, v in scenes.ATTRIBUTES["object"].items()}, "background": "white"}
    red = scenes.Scene("object", values).draw()[..., 0]
    assert len(np.unique(np.round(red, 3))) > 20


def test_training_never_sees_a_held_out_combination(host: Any, scenes: ModuleType) -> None:
    """Protects every measured claim: the training pool and the training pairs hold no held-out combination,
    while the pool has every value and the held-out scenes miss at most one value of an attribute.
    """
    pool = host.pack_module("lab.tiny_studio.train").pool_scenes()[:4000]
    assert not any(scenes.held_out(scene) for scene in pool)
    for edit_type in scenes.EDIT_TYPES:
        pair = scenes.sample_edit(edit_type, 5, "simple", held=False)
        assert not scenes.held_out(pair.source)
        assert not scenes.held_out(pair.target)
        assert scenes.held_out(scenes.sample_edit(edit_type, 5, "simple", held=True).target)
    rng = np.random.default_rng(4)
    held = [scenes.sample_scene(rng, held=True) for _ in range(1500)]
    for kind, attributes in scenes.ATTRIBUTES.items():
        for name, options in attributes.items():
            assert {s.values[name] for s in pool if s.kind == kind} == set(options)
            assert len({s.values[name] for s in held if s.kind == kind}) >= len(options) - 1


@pytest.mark.parametrize(
    ("named", "text"),
    [
        (None, "a drawing of a large striped red circle on the left on a blue background"),
        ({"colour"}, "a striped red circle"),
        ({"background"}, "a striped circle on a blue background"),
    ],
)
def test_captions_are_exact(scenes: ModuleType, named: set[str] | None, text: str) -> None:
    """Protects the wording that the model was trained on."""
    scene = scenes.Scene(
        "object",
        {
            "shape": "circle",
            "colour": "red",
            "texture": "striped",
            "size": "large",
            "place": "left",
            "background": "blue",
            "style": "flat",
        },
    )
    assert scenes.caption(scene, named) == text


def test_an_unknown_edit_type_is_refused(scenes: ModuleType) -> None:
    """Protects callers from a pair of the wrong kind."""
    with pytest.raises(ValueError, match="edit type 'shape' must be one of"):
        scenes.sample_edit("shape", 0)
