"""Edit pairs in a folder: `name_source.png`, `name_edit.png` and `name.json` with both descriptions.

The JSON holds {"source": "what the first shows", "edit": "what the second shows"}. Pictures may be png, jpg
or webp. A pair that cannot be used is counted, logged with its name and skipped; more than 1% of them stops.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from kornia.geometry.transform import center_crop, resize
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMALLEST = 64
BAD_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class EditPair:
    """source, edit: pictures of one size, [height, width, 3], 0 to 1; and the descriptions of both."""

    name: str
    source: torch.Tensor
    edit: torch.Tensor
    source_text: str
    edit_text: str


class BadPair(ValueError):
    """A pair that cannot be used."""


def read_folder(folder: Path, resolution: int, step: int) -> Iterator[EditPair]:
    """Every usable pair of a folder, by name, scaled and cropped to its bucket.

    Raises ValueError for a folder without pairs, and when more than 1% of them are bad, naming the first.
    """
    names = sorted(file.stem for file in folder.glob("*.json"))
    if not names:
        raise ValueError(
            f"no edit pairs in {folder.name}: it needs name_source.png, name_edit.png and name.json for each"
        )
    bad: list[str] = []
    for name in names:
        try:
            yield _read(folder, name, resolution, step)
        except BadPair as problem:
            logging.warning("edit pair %s: %s", name, problem)
            bad.append(f"{name}: {problem}")
            if len(bad) > max(1.0, BAD_SHARE * len(names)) or len(bad) == len(names):
                raise ValueError(
                    f"{len(bad)} of {len(names)} edit pairs in {folder.name} cannot be used, more than 1%; "
                    f"the first is {bad[0]}"
                ) from None


def buckets(resolution: int, step: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of about resolution x resolution pixels in multiples of `step`, 1:2 to 2:1."""
    found = set()
    for height in range(step, 2 * resolution + 1, step):
        width = max(step, round(resolution * resolution / height / step) * step)
        if max(height, width) <= 2 * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


def fitted(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[height, width, 3] scaled to cover `size` and cropped to it around the middle."""
    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture
    scale = max(size[0] / height, size[1] / width)
    covering = math.ceil(height * scale - 1e-6), math.ceil(width * scale - 1e-6)
    image = resize(rearrange(picture, "h w c -> 1 c h w"), covering, antialias=True)
    return rearrange(center_crop(image, size), "1 c h w -> h w c").clamp(0, 1)


def _read(folder: Path, name: str, resolution: int, step: int) -> EditPair:
    try:
        texts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        source_text, edit_text = texts["source"], texts["edit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadPair(f'its JSON has no "source" and "edit" texts ({error})') from None
    if not all(isinstance(text, str) and text.strip() for text in (source_text, edit_text)):
        raise BadPair("a description is empty")
    source, edit = (_picture(folder, f"{name}_{role}") for role in ("source", "edit"))
    if source.shape != edit.shape:
        sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (source, edit)]
        raise BadPair(f"the source is {sizes[0]} and the edit {sizes[1]}")
    shape = math.log(source.shape[0] / source.shape[1])
    size = min(buckets(resolution, step), key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))
    return EditPair(name, fitted(source, size), fitted(edit, size), source_text, edit_text)


def _picture(folder: Path, stem: str) -> torch.Tensor:
    path = next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)
    if path is None:
        raise BadPair(f"there is no {stem}.png")
    try:
        with Image.open(path) as file:
            pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGB"), np.float32) / 255
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadPair(f"{path.name} cannot be read ({error})") from None
    if min(pixels.shape[:2]) < SMALLEST:
        raise BadPair(f"{path.name} is smaller than {SMALLEST} pixels")
    return torch.from_numpy(pixels)


def batches(sizes: Sequence[tuple[int, int]], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches of pair numbers, each of one size, shuffled; the same for the same seed and epoch.

    Pairs that do not fill a batch are left out of this epoch, unless a size has fewer than one batch: then
    some of them come twice.
    """
    rng = np.random.default_rng([seed, epoch])
    found = []
    for size in sorted(set(sizes)):
        members = rng.permutation([number for number, other in enumerate(sizes) if other == size])
        if len(members) < batch:
            members = np.resize(members, batch)
        found += [members[i : i + batch].tolist() for i in range(0, len(members) - batch + 1, batch)]
    return [found[i] for i in rng.permutation(len(found))]
