"""The drawn world measures everything else: its captions, masks and held-out combinations must hold."""

from __future__ import annotations

from difflib import SequenceMatcher
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def scenes(host: Any) -> ModuleType:
    return host.pack_module("models.tiny_studio.scenes")


EDITS = [
    (kind, wording)
    for kind in ("colour", "texture", "object", "background", "style", "face", "two objects")
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
        old, new = pair.source_text.split(), pair.edit_text.split()
        changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        assert any(change != "equal" and a < b for change, _, _, a, b in changes), (
            "an edit description must bring a word of its own"
        )


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
    for edit_type in (*scenes.EDIT_TYPES, scenes.TWO):
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


def two_objects(scenes: ModuleType, **values: str) -> Any:
    """A plain red circle and a plain blue square on white, but for `values`."""
    plain = {
        "left_shape": "circle",
        "left_colour": "red",
        "left_texture": "plain",
        "right_shape": "square",
        "right_colour": "blue",
        "right_texture": "plain",
        "background": "white",
        "style": "flat",
    }
    return scenes.Scene("two", {**plain, **values})


def test_two_objects_have_their_own_places_and_attributes(scenes: ModuleType) -> None:
    """Protects what the first and the second words mean: the first object is on the left in its own colour
    and shape, the second on the right in its own, and each half is the half of a scene of that object alone.
    """
    scene = two_objects(scenes)
    picture = scene.draw()
    for x, colour in ((32, (0.86, 0.16, 0.15)), (96, (0.16, 0.36, 0.86)), (64, (0.96, 0.96, 0.95))):
        np.testing.assert_allclose(
            picture[60:68, x - 2 : x + 2], np.broadcast_to(colour, (8, 4, 3)), atol=1e-6
        )
    # 16.5 pixels across and up is inside of a square of 39.6; 18.5, 26.2 away, outside of a circle of 23.
    np.testing.assert_allclose(picture[64 - 17, 96 - 17], (0.16, 0.36, 0.86), atol=1e-6)
    np.testing.assert_allclose(picture[64 - 19, 32 - 19], (0.96, 0.96, 0.95), atol=1e-6)
    shared = {"texture": "plain", "size": "small", "background": "white", "style": "flat"}
    circle = scenes.Scene("object", {"shape": "circle", "colour": "red", "place": "left", **shared}).draw()
    square = scenes.Scene("object", {"shape": "square", "colour": "blue", "place": "right", **shared}).draw()
    assert np.array_equal(picture, np.concatenate([circle[:, :64], square[:, 64:]], axis=1))


@pytest.mark.parametrize(
    ("change", "side", "area"),
    [
        # Its own outline and 3 pixels around it.
        ({"left_colour": "green"}, 0, np.pi * 26.0**2),
        ({"right_texture": "dotted"}, 1, (2 * (23.0 * 0.86 + 3.0)) ** 2),
    ],
)
def test_the_mask_of_one_of_two_objects(
    scenes: ModuleType, change: dict[str, str], side: int, area: float
) -> None:
    """Protects the measure of binding: the mask is the edited object's place and none of the other one's."""
    source = two_objects(scenes)
    target = source.changed(**change)
    ((name, value),) = change.items()
    pair = scenes.EditPair("two objects", source, target, scenes.caption(source), scenes.caption(target))
    assert pair.changed == {name: value}
    mask = pair.mask()
    changed = np.abs(source.draw() - target.draw()).max(axis=-1) > 0
    assert mask[changed].min() == 1
    other = slice(64, None) if side == 0 else slice(None, 64)
    assert not changed[:, other].any()
    assert mask[:, other].max() == 0
    assert mask.sum() == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        (None, "a drawing of a plain red circle and an orange square on a white background"),
        ({"left_colour", "right_colour"}, "a red circle and an orange square"),
        ({"style"}, "a drawing of a circle and a square"),
        ({"right_colour", "background"}, "a circle and an orange square on a white background"),
    ],
)
def test_captions_of_two_objects_are_exact(scenes: ModuleType, named: set[str] | None, text: str) -> None:
    """Protects the wording that the model was trained on: the left object first, each with its own words."""
    scene = two_objects(scenes, right_colour="orange")
    if named is None:
        named = set(scene.values) - {"right_texture"}
    assert scenes.caption(scene, named) == text
    striped = scene.changed(right_texture="striped")
    assert scenes.caption(striped, {"left_colour"}) == "a red circle and a striped square"


def test_an_edit_of_one_of_two_objects_as_an_instruction(scenes: ModuleType) -> None:
    """Protects what the instruction names: which object, since there are two."""
    source = two_objects(scenes)
    for change, text in (
        ({"left_colour": "green"}, "make the circle green"),
        ({"right_shape": "star"}, "replace the square with a star"),
        ({"right_texture": "dotted"}, "make the square dotted"),
    ):
        pair = scenes.EditPair("two objects", source, source.changed(**change), "", "")
        assert scenes.instruction(pair) == text


def test_scenes_of_two_objects_can_be_told_apart(host: Any, scenes: ModuleType) -> None:
    """Protects what is measured on them: no shape, no colour twice, none vanishes, every value occurs, every
    caption fits the text encoder and has words that it knows; and no combination that single scenes hold out
    is trained in either place.
    """
    words = host.pack_module("models.tiny_studio.words")
    known = set(words.vocabulary())
    rng = np.random.default_rng(6)
    for held in (False, True):
        chosen = [scenes.sample_scene(rng, "two", held=held) for _ in range(400)]
        for scene in chosen:
            v = scene.values
            assert v["left_shape"] != v["right_shape"]
            assert v["left_colour"] != v["right_colour"]
            assert v["background"] not in (v["left_colour"], v["right_colour"])
            shared = {"size": "small", "place": "left", "background": "white", "style": "flat"}
            alone = [
                {name: v[f"{side}_{name}"] for name in ("shape", "colour", "texture")} | shared
                for side in ("left", "right")
            ]
            single = [scenes.held_out(scenes.Scene("object", values)) for values in alone]
            assert any(single) == held == scenes.held_out(scene)
            tokens = words.tokens(scenes.caption(scene))
            assert len(tokens) <= words.LENGTH
            assert set(tokens) <= known
        for name, options in scenes.TWO_OBJECTS.items():
            assert {scene.values[name] for scene in chosen} == set(options)
    pool = host.pack_module("lab.tiny_studio.train_two").pool_scenes()[:2000]
    assert {scene.kind for scene in pool[1::2]} == {"two"}
    assert {scene.kind for scene in pool[::2]} == {"object", "face"}
    assert not any(map(scenes.held_out, pool))
