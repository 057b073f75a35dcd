"""Pictures side by side under their labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from .lettering import Lettering

_GAP, _FONT = 6, 14


def draw_sheet(columns: Sequence[tuple[str, torch.Tensor]], side: int) -> torch.Tensor:
    """Columns of pictures, each under its label.

    columns: label and IMAGE, [rows or 1, height, width, 3], 0 to 1, of any sizes; a single picture is
    repeated in every row. side: of a cell, in pixels, which a picture's longer side is scaled to. Returns an
    IMAGE, [1, height, width, 3]. Raises ValueError for columns of other lengths.
    """
    lengths = [len(images) for _, images in columns]
    rows = max(lengths)
    wrong = [f"input {n} has {count}" for n, count in enumerate(lengths, start=1) if count not in (1, rows)]
    if wrong:
        raise ValueError(f"one input has {rows} images but {', '.join(wrong)}: give one, or {rows}")
    lettering = Lettering(_FONT)
    labels = [lettering.wrap(label, side) for label, _ in columns]
    cells = [
        [_scaled(images[row if len(images) > 1 else 0], side) for _, images in columns] for row in range(rows)
    ]
    head = (_FONT + 3) * max(map(len, labels)) + _GAP
    heights = [max(cell.height for cell in row) + _GAP for row in cells]
    sheet = Image.new("RGB", (len(columns) * (side + _GAP) + _GAP, head + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        x = _GAP + column * (side + _GAP)
        for number, line in enumerate(label):
            lettering.draw(pen, (x, 2 + number * (lettering.height + 3)), line)
        for row, cell in enumerate(row[column] for row in cells):
            middle = (side - cell.width) // 2, (heights[row] - _GAP - cell.height) // 2
            sheet.paste(cell, (x + middle[0], head + sum(heights[:row]) + middle[1]))
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _scaled(image: torch.Tensor, side: int) -> Image.Image:
    pixels = (image[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
