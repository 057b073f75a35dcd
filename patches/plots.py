"""Curves over a sampling as a picture, drawn with what the host brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

_COLOURS = ("#1f5fbf", "#c8401f")


def draw_curves(
    curves: Mapping[str, Sequence[float]],
    ends: tuple[str, str] = ("noise", "image"),
    width: int = 512,
    height: int = 288,
) -> torch.Tensor:
    """One or two named curves, each of values at equal distances between two `ends`.

    The axis spans them and 0. Returns an IMAGE, [1, height, width, 3], 0 to 1.
    """
    left, top, right, bottom = 48, 28, width - 16, height - 36
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    values = [value for curve in curves.values() for value in curve]
    floor, ceiling = min(0.0, *values), max(0.0, *values)
    ceiling = ceiling if ceiling > floor else floor + 1.0

    def place(share: float, value: float) -> tuple[float, float]:
        height = (value - floor) / (ceiling - floor)
        return left + share * (right - left), bottom - height * (bottom - top)

    draw.line([(left, top), (left, bottom)], fill="black")
    draw.line([place(0, 0), place(1, 0)], fill="black")
    draw.text((left, bottom + 6), ends[0], fill="black")
    draw.text((right, bottom + 6), ends[1], fill="black", anchor="ra")
    draw.text((left - 6, bottom), f"{floor:.3g}", fill="black", anchor="rs")
    draw.text((left - 6, top), f"{ceiling:.3g}", fill="black", anchor="rt")
    for number, ((label, curve), colour) in enumerate(zip(curves.items(), _COLOURS, strict=False)):
        points = [place(index / (len(curve) - 1), value) for index, value in enumerate(curve)]
        draw.line(points, fill=colour, width=3, joint="curve")
        draw.text((left + 12 + 150 * number, 8), f"- {label}", fill=colour)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
