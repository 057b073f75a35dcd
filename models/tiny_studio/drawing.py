"""Draws the Tiny Studio's scenes, and masks where an edit may change them.

Shapes are signed distances in pixels, painted by coverage. An image is a pure function of its scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .scenes import Scene

SIZE = 128

_COLOURS = {
    "red": (0.86, 0.16, 0.15),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.98, 0.87, 0.18),
    "green": (0.16, 0.62, 0.24),
    "blue": (0.16, 0.36, 0.86),
    "purple": (0.55, 0.22, 0.70),
}
_BACKGROUNDS = {
    "white": (0.96, 0.96, 0.95),
    "pink": (0.98, 0.74, 0.82),
    "blue": (0.66, 0.80, 0.97),
    "green": (0.72, 0.92, 0.70),
}
_SKINS = {"pale": (0.99, 0.87, 0.77), "tan": (0.90, 0.69, 0.48), "brown": (0.55, 0.36, 0.24)}
_HAIRS = {
    "black": (0.12, 0.11, 0.13),
    "blond": (0.97, 0.83, 0.38),
    "red": (0.80, 0.27, 0.10),
    "blue": (0.25, 0.45, 0.90),
}
_INK = (0.08, 0.08, 0.11)
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _cover(distance: np.ndarray) -> np.ndarray:
    return np.clip(0.5 - distance, 0.0, 1.0)[..., None]


def _paint(image: np.ndarray, distance: np.ndarray, colour: tuple[float, ...] | np.ndarray) -> None:
    cover = _cover(distance)
    image += cover * (np.asarray(colour, np.float32) - image)


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    return (np.hypot((_X - cx) / rx, (_Y - cy) / ry) - 1.0) * min(rx, ry)


def _array(values: Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    return np.asarray(values, np.float32)


def _polygon(points: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon: exact outside and inside, for points [n, 2]."""
    ends = np.roll(points, -1, axis=0)
    distance = np.full(_X.shape, np.inf, np.float32)
    inside = np.zeros(_X.shape, bool)
    for (ax, ay), (bx, by) in zip(points, ends, strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, _X - ax, _Y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        distance = np.minimum(distance, np.hypot(wx - ex * t, wy - ey * t))
        crosses = (ay <= _Y) != (by <= _Y)
        inside ^= crosses & (ax + wy * ex / (ey if ey else 1.0) > _X)
    return np.where(inside, -distance, distance)


def _ring_points(cx: float, cy: float, radii: np.ndarray, turn: float) -> np.ndarray:
    angles = turn + np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([cx + radii * np.cos(angles), cy + radii * np.sin(angles)], axis=1)


def _object_distance(scene: Scene) -> np.ndarray:
    large = scene.values["size"] == "large"
    radius = 35.0 if large else 23.0
    reach = 16.0 if large else 32.0
    cx = (
        64.0
        + {"left": -reach, "middle": 0.0, "right": reach}[scene.values["place"]]
        + (0 if large else scene.dx)
    )
    cy = 64.0 + scene.dy
    match scene.values["shape"]:
        case "circle":
            return np.hypot(_X - cx, _Y - cy) - radius
        case "square":
            return np.maximum(np.abs(_X - cx), np.abs(_Y - cy)) - radius * 0.86
        case "triangle":
            return _polygon(_ring_points(cx, cy + radius * 0.2, np.full(3, radius * 1.18), -np.pi / 2))
        case _:
            return _polygon(_ring_points(cx, cy, np.tile([radius * 1.16, radius * 0.5], 5), -np.pi / 2))


def _wave(value: np.ndarray, period: float, duty: float) -> np.ndarray:
    """Coverage of the bars of a square wave, antialiased."""
    offset = np.abs((value % period) - period / 2)
    return np.clip(0.5 + duty * period / 2 - offset, 0.0, 1.0)


def _texture(name: str, colour: np.ndarray) -> np.ndarray:
    light = 0.25 * colour + 0.75
    match name:
        case "striped":
            cover = _wave(_Y, 16.0, 0.5)
        case "dotted":
            cover = np.clip(0.5 + 4.5 - np.hypot(_X % 16.0 - 8.0, _Y % 16.0 - 8.0), 0.0, 1.0)
        case "checked":
            across, down = _wave(_X, 16.0, 0.5), _wave(_Y, 16.0, 0.5)
            cover = across * (1.0 - down) + down * (1.0 - across)
        case _:
            cover = np.zeros_like(_X)
    return colour + cover[..., None] * (light - colour)


@cache
def _background(name: str, variant: int) -> np.ndarray:
    shift = 24.0 * variant
    down = (_Y / SIZE)[..., None]
    if name in _BACKGROUNDS:
        return np.broadcast_to(np.asarray(_BACKGROUNDS[name], np.float32), (SIZE, SIZE, 3))
    match name:
        case "sky":
            image = _array([0.30, 0.60, 0.95]) + down * _array([0.40, 0.25, 0.03])
            for cx, cy in ((20.0, 18.0), (84.0, 26.0), (40.0, 112.0), (108.0, 104.0)):
                cx = (cx + shift) % SIZE
                for ox, oy, r in ((-9.0, 2.0, 7.0), (0.0, -2.0, 9.0), (9.0, 2.0, 7.0)):
                    _paint(image, np.hypot(_X - cx - ox, _Y - cy - oy) - r, (0.99, 0.99, 1.0))
        case "grass":
            image = _array([0.36, 0.70, 0.22]) - down * _array([0.12, 0.18, 0.08])
            for row in range(5):
                for column in range(4):
                    cx, cy = (32.0 * column + 16.0 * (row % 2) + 12.0 + shift) % SIZE, 12.0 + 24.0 * row
                    blade = _array([[cx - 4, cy + 6], [cx + 4, cy + 6], [cx, cy - 7]])
                    _paint(image, _polygon(blade), (0.16, 0.42, 0.12))
        case "sand":
            ripple = 0.5 + 0.5 * np.sin(
                (_Y + 3.0 * np.sin((_X + shift) * (2 * np.pi / 64.0))) * (2 * np.pi / 16.0)
            )
            image = _array([0.93, 0.80, 0.52]) - ripple[..., None] * _array([0.13, 0.14, 0.15])
        case _:
            image = _array([0.05, 0.06, 0.22]) + down * _array([0.06, 0.05, 0.16])
            for cx, cy in (
                (12, 20),
                (44, 10),
                (76, 16),
                (100, 44),
                (20, 60),
                (116, 76),
                (12, 100),
                (48, 118),
                (88, 112),
            ):
                _paint(image, np.hypot(_X - (cx + shift) % SIZE, _Y - cy) - 2.6, (0.99, 0.97, 0.80))
            moon = np.maximum(np.hypot(_X - 108, _Y - 18) - 11, 9 - np.hypot(_X - 103, _Y - 15))
            _paint(image, moon, (0.99, 0.95, 0.70))
    return image


def _draw_object(image: np.ndarray, scene: Scene) -> None:
    distance = _object_distance(scene)
    colour = np.asarray(_COLOURS[scene.values["colour"]], np.float32)
    _paint(image, distance - 1.5, _INK)
    _paint(image, distance + 1.5, _texture(scene.values["texture"], colour))


def _face_centre(scene: Scene) -> tuple[float, float]:
    return 64.0 + scene.dx, 68.0 + scene.dy


def _hair_distance(scene: Scene) -> np.ndarray:
    cx, cy = _face_centre(scene)
    return np.minimum(
        _ellipse(cx, cy - 10, 42, 40), np.maximum(np.abs(_X - cx) - 41, np.abs(_Y - cy - 8) - 20)
    )


def _draw_face(image: np.ndarray, scene: Scene) -> None:
    cx, cy = _face_centre(scene)
    hair, skin = _HAIRS[scene.values["hair"]], _SKINS[scene.values["skin"]]
    back = _hair_distance(scene)
    _paint(image, back - 1.5, _INK)
    _paint(image, back + 1.5, hair)
    head = _ellipse(cx, cy, 33, 40)
    _paint(image, head - 1.5, _INK)
    _paint(image, head + 1.5, skin)
    _paint(image, np.maximum(head + 1.5, _Y - (cy - 18)), hair)
    for side in (-1.0, 1.0):
        ex, ey = cx + side * 13, cy - 2
        _paint(image, np.hypot(_X - ex, _Y - ey) - 4.2, _INK)
    expression = scene.values["expression"]
    if expression == "surprised":
        mouth = _ellipse(cx, cy + 21, 7.5, 10)
    else:
        bend = 1.0 if expression == "sad" else -1.0
        curve = cy + 21 - 5 * bend + bend * (_X - cx) ** 2 * 0.033
        mouth = np.maximum(np.abs(_Y - curve) - 2.6, np.abs(_X - cx) - 16)
    _paint(image, mouth, (0.55, 0.08, 0.12))
    lift = -15.0 if expression == "surprised" else -12.0
    for side in (-1.0, 1.0):
        x = (_X - cx) * side
        line = cy + lift + (0.5 * (x - 13) if expression == "sad" else 0.0)
        _paint(image, np.maximum(np.abs(_Y - line) - 1.8, np.abs(x - 13) - 7.5), _INK)
    if scene.values["glasses"] == "yes":
        for side in (-1.0, 1.0):
            _paint(image, np.abs(np.hypot(_X - cx - side * 13, _Y - cy + 2) - 10.0) - 1.6, (0.15, 0.15, 0.55))
        _paint(image, np.maximum(np.abs(_X - cx) - 4, np.abs(_Y - cy + 2) - 1.6), (0.15, 0.15, 0.55))


def _stylised(image: np.ndarray, style: str) -> np.ndarray:
    match style:
        case "sketch":
            light = image @ _array([0.299, 0.587, 0.114])
            padded = np.pad(light, 1, mode="edge")
            slope = np.hypot(padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1])
            paper = 0.55 * _array([0.97, 0.96, 0.92]) + 0.45 * image
            line = np.clip(slope * 2.2 - 0.12, 0.0, 0.85)[..., None]
            return paper * (1.0 - line) + 0.25 * line
        case "negative":
            return 1.0 - image
        case "sepia":
            grey = (image @ _array([0.299, 0.587, 0.114]))[..., None]
            tinted = np.clip(grey * _array([0.85, 0.68, 0.46]) + _array([0.13, 0.09, 0.03]), 0, 1)
            return 0.55 * tinted + 0.45 * image
        case _:
            return image


def draw(scene: Scene) -> np.ndarray:
    """The scene as float32 [128, 128, 3], sRGB values 0 to 1."""
    image = _background(scene.values["background"], scene.variant).copy()
    if scene.kind == "face":
        _draw_face(image, scene)
    for one in scene.objects():
        _draw_object(image, one)
    return np.clip(_stylised(image, scene.values["style"]), 0.0, 1.0).astype(np.float32)


def foreground(scene: Scene, margin: float = 2.0) -> np.ndarray:
    """Mask of the objects or the head, float32 [128, 128] of 0 or 1, grown by `margin` pixels."""
    if scene.kind == "face":
        distance = np.minimum(_hair_distance(scene), _ellipse(*_face_centre(scene), 33, 40))
    else:
        distance = np.minimum.reduce([_object_distance(one) for one in scene.objects()])
    return (distance < margin).astype(np.float32)


def edit_mask(source: Scene, target: Scene) -> np.ndarray | None:
    """Where an edit from `source` to `target` may change pixels; None when the style changes (everywhere)."""
    changed = {k for k in source.values if source.values[k] != target.values[k]}
    if "style" in changed:
        return None
    if "background" in changed:
        return 1.0 - foreground(source, margin=0.0)
    if source.kind != "face":
        parts = [
            np.maximum(foreground(before, 3.0), foreground(after, 3.0))
            for before, after in zip(source.objects(), target.objects(), strict=True)
            if before.values != after.values
        ]
        return np.maximum.reduce(parts)
    cx, cy = _face_centre(source)
    part = _ellipse(cx, cy - 2, 33, 17) if changed == {"glasses"} else _ellipse(cx, cy + 5, 32, 34)
    return (part < 0).astype(np.float32)
