"""Images side by side under their labels, as one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..models.files import replacing
from .lettering import Lettering

_GAP, _LABEL, _CAPTION = 6, 14, 11


def draw_sheet(
    columns: Sequence[tuple[str, torch.Tensor | Sequence[torch.Tensor]]],
    side: int,
    captions: Sequence[Sequence[str]] = (),
    framed: Sequence[Sequence[bool]] = (),
) -> torch.Tensor:
    """Columns of images, each column under its label. Returns an IMAGE, [1, height, width, 3], 0 to 1.

    Args:
        columns: label and images, each [height, width, 3], 0 to 1, of any size. A single image is repeated in
            every row.
        side: of a cell, in pixels: the length that the longer side of an image is scaled to.
        captions: by row and column, a text below the image.
        framed: by row and column, whether the image gets a red frame.

    Raises ValueError for columns of different lengths.
    """
    lengths = [len(images) for _, images in columns]
    rows = max(lengths)
    wrong = [f"input {n} has {count}" for n, count in enumerate(lengths, start=1) if count not in (1, rows)]
    if wrong:
        raise ValueError(f"one input has {rows} images but {', '.join(wrong)}: give one, or {rows}")
    lettering, small = Lettering(_LABEL), Lettering(_CAPTION)
    labels = [lettering.wrap(label, side) for label, _ in columns]
    cells = [
        [_scaled(images[row if len(images) > 1 else 0], side) for _, images in columns] for row in range(rows)
    ]
    texts = [[small.wrap(text, side) for text in row] for row in captions] or [[[]] * len(columns)] * rows
    head = (_LABEL + 3) * max(map(len, labels)) + _GAP
    heights = [max(cell.height for cell in row) for row in cells]
    below = [(_CAPTION + 3) * max(map(len, row)) + _GAP for row in texts]
    size = len(columns) * (side + _GAP) + _GAP, head + sum(heights) + sum(below)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        x, y = _GAP + column * (side + _GAP), head
        _write(pen, lettering, (x, 2), label)
        for row, cell in enumerate(line[column] for line in cells):
            left, top = x + (side - cell.width) // 2, y + (heights[row] - cell.height) // 2
            sheet.paste(cell, (left, top))
            if framed and framed[row][column]:
                pen.rectangle(
                    (left, top, left + cell.width - 1, top + cell.height - 1), outline="red", width=3
                )
            _write(pen, small, (x, y + heights[row] + 1), texts[row][column])
            y += heights[row] + below[row]
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """An image [height, width, 3 or more], 0 to 1, in 8 bits."""
    return Image.fromarray((pixels[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy())


def save_image(image: Image.Image, file: Path) -> None:
    """In the format of the file's ending, under a temporary name first."""
    with replacing(file) as part:
        image.save(part, Image.registered_extensions()[file.suffix], quality=88)


def _write(
    pen: ImageDraw.ImageDraw, lettering: Lettering, start: tuple[int, int], lines: Sequence[str]
) -> None:
    for number, line in enumerate(lines):
        lettering.draw(pen, (start[0], start[1] + number * (lettering.height + 3)), line)


def _scaled(pixels: torch.Tensor, side: int) -> Image.Image:
    image = to_image(pixels)
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
