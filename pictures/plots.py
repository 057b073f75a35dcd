"""Curves over a sampling as a picture, drawn with what the host brings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_COLOURS = ("#1f5fbf", "#c8401f")
_CROSS = "#303030"
_TEXT = 18  # pixels: readable where a node shows the plot at half its size


def draw_curves(
    curves: Mapping[str, Sequence[float] | np.ndarray],
    ends: tuple[str, str] = ("noise", "image"),
    width: int = 512,
    height: int = 288,
) -> torch.Tensor:
    """Draws one or two named curves of equally spaced values between two `ends`.

    The axis spans them and 0. Returns an IMAGE, [1, height, width, 3], 0 to 1.
    """
    values = [value for curve in curves.values() for value in curve]
    floor, ceiling = min(0.0, *values), max(0.0, *values)
    picture = Image.new("RGB", (width, height), "white")
    axes = _Axes(ImageDraw.Draw(picture), (0, 0, width, height), floor, ceiling)
    axes.frame(ends)
    for number, (label, curve) in enumerate(curves.items()):
        axes.curve(number, label, [index / (len(curve) - 1) for index in range(len(curve))], [*curve])
    return _image(picture)


@dataclass(frozen=True)
class Panel:
    """One plot in an image of several.

    places: the steps at which the values of each of `curves` lie; a value that is not finite leaves a gap.
    crosses: steps to mark.
    """

    title: str
    places: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    crosses: Sequence[float] = field(default=())


def draw_panels(panels: Sequence[Panel], steps: int, width: int = 512, height: int = 240) -> torch.Tensor:
    """Draws panels one below the other over `steps` steps. Each curve is relative to its own largest
    magnitude, which its label gives.

    Returns an IMAGE, [1, panels * height, width, 3], 0 to 1.
    """
    picture = Image.new("RGB", (width, height * len(panels)), "white")
    draw = ImageDraw.Draw(picture)
    span = max(1, steps)
    for row, panel in enumerate(panels):
        peaks = {
            label: max((abs(value) for value in curve if math.isfinite(value)), default=0.0) or 1.0
            for label, curve in panel.curves.items()
        }
        below = any(value < 0 for curve in panel.curves.values() for value in curve)
        axes = _Axes(draw, (0, row * height, width, height), -1.0 if below else 0.0, 1.0)
        axes.frame((f"{panel.title}: step 1", f"step {steps}"))
        for number, (label, curve) in enumerate(panel.curves.items()):
            shares = [place / span for place in panel.places]
            values = [value / peaks[label] for value in curve]
            axes.curve(number, f"{label}, max {peaks[label]:.3g}", shares, values, gap=220)
        for place in panel.crosses:
            axes.cross(place / span)
    return _image(picture)


class _Axes:
    """A plot area inside `box` (left, top, width, height) whose values go from `floor` to `ceiling`."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], floor: float, ceiling: float
    ) -> None:
        left, top, width, height = box
        self._draw, self._head = draw, top + 6
        self._font = ImageFont.load_default(_TEXT)
        self._left, self._top = left + 72, top + 36
        self._right, self._bottom = left + width - 16, top + height - 36
        self._floor, self._ceiling = floor, ceiling if ceiling > floor else floor + 1.0

    def _place(self, share: float, value: float) -> tuple[float, float]:
        height = (value - self._floor) / (self._ceiling - self._floor)
        return self._left + share * (self._right - self._left), self._bottom - height * (
            self._bottom - self._top
        )

    def frame(self, ends: tuple[str, str]) -> None:
        draw, left, bottom = self._draw, self._left, self._bottom
        draw.line([(left, self._top), (left, bottom)], fill="black")
        draw.line([self._place(0, 0), self._place(1, 0)], fill="black")
        for place, text, anchor in (
            ((left, bottom + 6), ends[0], "la"),
            ((self._right, bottom + 6), ends[1], "ra"),
            ((left - 6, bottom), f"{self._floor:.3g}", "rs"),
            ((left - 6, self._top), f"{self._ceiling:.3g}", "rt"),
        ):
            draw.text(place, text, "black", self._font, anchor)

    def curve(
        self, number: int, label: str, shares: Sequence[float], values: Sequence[float], gap: int = 200
    ) -> None:
        colour = _COLOURS[number]
        self._draw.text((self._left + 12 + gap * number, self._head), label, colour, self._font)
        run: list[tuple[float, float]] = []
        for share, value in [*zip(shares, values, strict=True), (0.0, math.nan)]:
            if math.isfinite(value):
                run.append(self._place(share, value))
            elif run:
                if len(run) == 1:
                    x, y = run[0]
                    run = [(x - 1, y), (x + 1, y)]
                self._draw.line(run, fill=colour, width=3, joint="curve")
                run = []

    def cross(self, share: float) -> None:
        x, y = self._place(share, 0)
        for slope in (-4, 4):
            self._draw.line([(x - 4, y - slope), (x + 4, y + slope)], fill=_CROSS, width=2)


def _image(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
