"""Scenes of the Tiny Studio with exact captions, and for six edit types the true edited scene.

A seventh set has scenes of two objects, in which words compete. A `Scene` holds everything a caption can say
(`values`) and the little that it cannot (`dx`, `dy`, `variant`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from . import drawing

BACKGROUNDS = ("white", "pink", "blue", "green", "sky", "grass", "sand", "night")
STYLES = ("flat", "sketch", "negative", "sepia")
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "object": {
        "shape": ("circle", "square", "triangle", "star"),
        "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
        "texture": ("plain", "striped", "dotted", "checked"),
        "size": ("small", "large"),
        "place": ("left", "middle", "right"),
        "background": BACKGROUNDS,
        "style": STYLES,
    },
    "face": {
        "expression": ("smiling", "sad", "surprised"),
        "skin": ("pale", "tan", "brown"),
        "hair": ("black", "blond", "red", "blue"),
        "glasses": ("no", "yes"),
        "background": BACKGROUNDS,
        "style": STYLES,
    },
}
SIDES = ("left", "right")
OWN = ("shape", "colour", "texture")  # attributes that each of two objects has
TWO_OBJECTS: dict[str, tuple[str, ...]] = {
    **{f"{side}_{name}": ATTRIBUTES["object"][name] for side in SIDES for name in OWN},
    "background": BACKGROUNDS,
    "style": STYLES,
}
EDIT_TYPES = ("colour", "texture", "object", "background", "style", "face")
TWO = "two objects"  # edits of one attribute of one of two objects
WORDINGS = ("simple", "complex")


@dataclass(frozen=True)
class Scene:
    """One image.

    kind: "object", "face" or "two".
    values: one value for each attribute of that kind.
    dx, dy: shift of what is drawn, -8, 0 or 8 pixels.
    variant: 0 to 2, moves clouds, stars and tufts.

    Everything lies on the 8-pixel grid of the latents, which is far easier for a small VAE.
    """

    kind: str
    values: dict[str, str] = field(hash=False)
    dx: int = 0
    dy: int = 0
    variant: int = 0

    def changed(self, **values: str) -> Scene:
        """The same scene with other attribute values; what no caption names stays the same."""
        return replace(self, values={**self.values, **values})

    def objects(self) -> list[Scene]:
        """The objects from left to right, each as a scene with only this object. A face has none."""
        if self.kind != "two":
            return [self] if self.kind == "object" else []
        shared = {"size": "small", "background": self.values["background"], "style": self.values["style"]}
        own = ({name: self.values[f"{side}_{name}"] for name in OWN} for side in SIDES)
        return [
            replace(self, kind="object", values={**values, **shared, "place": side})
            for side, values in zip(SIDES, own, strict=True)
        ]

    def draw(self) -> np.ndarray:
        """The image, float32 [128, 128, 3], sRGB values 0 to 1."""
        return drawing.draw(self)


@dataclass(frozen=True)
class EditPair:
    """A scene and its true edit. Texts describe the result, never the change."""

    edit_type: str
    source: Scene
    target: Scene
    source_text: str
    edit_text: str

    @property
    def changed(self) -> dict[str, str]:
        """The attributes that the edit changes, with their new values."""
        return {k: v for k, v in self.target.values.items() if self.source.values[k] != v}

    def mask(self) -> np.ndarray | None:
        """The edit region, float32 [128, 128] of 0 or 1; None for a style, which changes everything."""
        return drawing.edit_mask(self.source, self.target)


def attributes(kind: str) -> dict[str, tuple[str, ...]]:
    """The attributes of a scene of this kind with their values."""
    return TWO_OBJECTS if kind == "two" else ATTRIBUTES[kind]


def held_out(scene: Scene) -> bool:
    """Whether the scene's combination of attributes is excluded from all training (about one in nine).

    A scene of two objects is held out if one of them is.
    """
    if scene.kind == "two":
        return any(map(held_out, scene.objects()))
    index = {k: options.index(scene.values[k]) for k, options in ATTRIBUTES[scene.kind].items()}
    if scene.kind == "object":
        return (5 * index["shape"] + 7 * index["colour"] + 4 * index["texture"]) % 9 == 0
    return (5 * index["expression"] + 7 * index["hair"] + 4 * index["skin"] + 3 * index["glasses"]) % 9 == 0


_PLACE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_SCENERY = {"sky": "in the sky", "grass": "on grass", "sand": "on sand", "night": "at night"}
_STYLE = {
    "flat": "a drawing of",
    "sketch": "a sketch of",
    "negative": "a negative of",
    "sepia": "a sepia print of",
}
_PLAIN_TEXTURE = dict.fromkeys(("texture", *(f"{side}_texture" for side in SIDES)), "plain")
_IMPLIED = {**_PLAIN_TEXTURE, "glasses": "no", "style": "flat"}
_ALWAYS = {
    "object": {"shape"},
    "face": {"expression"},
    "two": {f"{side}_shape" for side in SIDES},
}
_ESSENTIAL = {
    "object": {"shape", "colour"},
    "face": {"expression"},
    "two": {f"{side}_{name}" for side in SIDES for name in ("shape", "colour")},
}


def said(scene: Scene, named: set[str]) -> set[str]:
    """The attributes that a caption naming `named` determines: those, and those whose absence has a
    meaning.
    """
    return named | _ALWAYS[scene.kind] | (_IMPLIED.keys() & scene.values.keys())


def caption(scene: Scene, named: set[str] | None = None) -> str:
    """The exact caption.

    named: the attributes it mentions, all by default. Shape and expression are always mentioned, and so are a
    texture, glasses or style other than the plain one: no mention means plain, none, flat.
    Of two objects the left one comes first.
    """
    v = scene.values
    named = (
        set(v) if named is None else named | {k for k, plain in _IMPLIED.items() if v.get(k, plain) != plain}
    )
    always = _ALWAYS[scene.kind]
    where = _where(v["background"]) if "background" in named else ""
    if scene.kind == "object":
        phrase = [_noun([v[k] for k in ("size", "texture", "colour") if k in named] + [v["shape"]])]
        phrase += [_PLACE[v["place"]]] if "place" in named else []
    elif scene.kind == "two":
        nouns = (
            [v[f"{side}_{k}"] for k in ("texture", "colour", "shape") if f"{side}_{k}" in named | always]
            for side in SIDES
        )
        phrase = [" and ".join(map(_noun, nouns))]
    else:
        having = [f"{v['skin']} skin"] if "skin" in named else []
        having += [f"{v['hair']} hair"] if "hair" in named else []
        having += ["glasses" if v["glasses"] == "yes" else "no glasses"] if "glasses" in named else []
        phrase = [f"a {v['expression']} face"] + (["with " + " and ".join(having)] if having else [])
    return " ".join(
        [*([_STYLE[v["style"]]] if "style" in named else []), *phrase, *([where] if where else [])]
    )


def _noun(words: list[str]) -> str:
    return ("an " if words[0] == "orange" else "a ") + " ".join(words)


def _where(background: str) -> str:
    return _SCENERY.get(background, f"on a {background} background")


def instruction(pair: EditPair) -> str:
    """The edit as an instruction, which names the change and not the result, such as "make it yellow"."""
    ((name, value),) = pair.changed.items()
    it = "it"
    if pair.source.kind == "two" and (side := name.partition("_")[0]) in SIDES:
        it, name = f"the {pair.source.values[f'{side}_shape']}", name.partition("_")[2]
    match name:
        case "shape":
            return f"replace {it} with a {value}"
        case "background":
            return f"put it {_where(value)}"
        case "style":
            return f"turn it into {_STYLE[value].removesuffix(' of')}"
        case "glasses":
            return "put glasses on" if value == "yes" else "take the glasses off"
        case _:
            return f"make {it} {value}"


def random_named(scene: Scene, rng: np.random.Generator) -> set[str]:
    """Which attributes a training caption names: all (half the time), the essential ones, or a random
    subset.
    """
    draw_ = rng.random()
    if draw_ < 0.5:
        return set(scene.values)
    if draw_ < 0.65:
        return set(_ESSENTIAL[scene.kind])
    keep = {k for k in scene.values if rng.random() < 0.6}
    return keep | (set() if rng.random() < 0.1 else _ESSENTIAL[scene.kind])


def _legal(scene: Scene) -> bool:
    """Whether no object vanishes in its background, and two objects differ in shape and colour.

    So each object can be named and a swap is visible.
    """
    if scene.kind == "two" and any(
        scene.values[f"left_{name}"] == scene.values[f"right_{name}"] for name in ("shape", "colour")
    ):
        return False
    return all(one.values["background"] != one.values["colour"] for one in scene.objects())


def sample_scene(rng: np.random.Generator, kind: str | None = None, held: bool = False) -> Scene:
    """A random scene whose combination is held out (`held`) or not. Half of all scenes are flat.

    kind: "object", "face" or "two"; by default one of the first two.
    """
    kind = kind or ("face" if rng.random() < 0.33 else "object")
    while True:
        values = {k: str(rng.choice(options)) for k, options in attributes(kind).items()}
        if rng.random() < 1 / 3:
            values["style"] = "flat"
        dx, dy = (int(v) for v in rng.integers(-1, 2, 2) * 8)
        scene = Scene(kind, values, dx, dy, int(rng.integers(3)))
        if _legal(scene) and held_out(scene) == held:
            return scene


_EDITED = {
    "colour": ("object", ("colour",)),
    "texture": ("object", ("texture",)),
    "object": ("object", ("shape",)),
    "background": (None, ("background",)),
    "style": (None, ("style",)),
    "face": ("face", ("expression", "glasses")),
    TWO: ("two", tuple(f"{side}_{name}" for side in SIDES for name in OWN)),
}


def sample_edit(edit_type: str, seed: int, wording: str = "complex", held: bool = False) -> EditPair:
    """A pair of one of EDIT_TYPES or TWO: the same arguments give the same pair.

    held: the target has a combination that no training saw; otherwise neither scene is held out.
    wording: "simple" names what the object is and what changes, "complex" names everything.
    """
    types = (*EDIT_TYPES, TWO)
    if edit_type not in types or wording not in WORDINGS:
        raise ValueError(f"edit type {edit_type!r} must be one of {types}, wording {wording!r} of {WORDINGS}")
    rng = np.random.default_rng([types.index(edit_type), WORDINGS.index(wording), int(held), seed])
    kind, changeable = _EDITED[edit_type]
    while True:
        target = sample_scene(rng, kind, held)
        attribute = str(rng.choice(changeable))
        options = [v for v in attributes(target.kind)[attribute] if v != target.values[attribute]]
        source = target.changed(**{attribute: str(rng.choice(options))})
        if edit_type == "style":
            source = source.changed(style="flat")
        if source.values != target.values and _legal(source) and (held or not held_out(source)):
            break
    named = set(source.values) if wording == "complex" else _ESSENTIAL[source.kind] | {attribute}
    # "no glasses" -> "glasses" would give the edit description no new word.
    source_named = (
        named - {"glasses"} if attribute == "glasses" and source.values["glasses"] == "no" else named
    )
    return EditPair(edit_type, source, target, caption(source, source_named), caption(target, named))
