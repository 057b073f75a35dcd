"""Edit pairs: two images of one size with their descriptions, made from samples, and batches of them.

A sample that cannot be used is counted, logged with its name and skipped; more than 1% of them stop the run.

A folder holds for each pair `name_source.png`, `name_edit.png` and `name.json` with both descriptions:
{"source": "what the first shows", "edit": "what the second shows"}. Images may be png, jpg or webp,
extensions in lower or upper case, and texts UTF-8, UTF-16 or UTF-32.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from kornia.geometry.transform import center_crop, resize
from PIL import Image, ImageOps

from ..models.files import write_bytes
from ..pictures.contact_sheet import save_image, to_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMALLEST = 64
WIDE = "IF"  # first letters of Pillow's modes with more than 8 bits
ONE_PICTURE = ("MPO",)  # formats whose extra images are the camera's, such as a smaller copy
BAD_SHARE = 0.01
FIRST_OF_A_STREAM = 1000

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class EditPair:
    """source, edit: images of one size, [height, width, 3], 0 to 1, and the descriptions of both."""

    name: str
    source: torch.Tensor
    edit: torch.Tensor
    source_text: str
    edit_text: str


class BadPair(ValueError):
    """A pair that cannot be used."""


class Picture(NamedTuple):
    """An image that is not read yet."""

    name: str
    open: Callable[[], Image.Image]


class Parts(NamedTuple):
    """What a sample holds. source_text, edit_text: whatever the data has there."""

    source: Picture
    edit: Picture
    source_text: Any
    edit_text: Any


class Sample(NamedTuple):
    """One sample before anything of it is decoded. parts: raises BadPair if one is missing."""

    name: str
    parts: Callable[[], Parts]


class Reading:
    """The usable pairs of a shard of the samples, in order; can be iterated once.

    shard: (rank, world), every world-th sample from the rank-th on; the others' images are not decoded.
    total: how many samples there are, None for a stream.
    numbers: of the pairs so far, their indices among all samples.
    bad: index and problem of the samples that cannot be used.
    seen: samples so far, those of other shards too.

    Iterating raises ValueError, see `too_many_bad`, for the bad samples of this shard: of `total` where it is
    known, else of those seen at the end, and until then of those seen but at least a thousand.
    """

    def __init__(
        self,
        where: str,
        samples: Iterable[Sample],
        resolution: int,
        step: int,
        total: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.where = where
        self.numbers: list[int] = []
        self.bad: list[tuple[int, str]] = []
        self.seen = 0
        self.total = total
        self._samples, self._shard = samples, shard
        self._buckets = buckets(resolution, step)

    def __iter__(self) -> Iterator[EditPair]:
        rank, world = self._shard
        for number, sample in enumerate(self._samples):
            self.seen = number + 1
            if number % world != rank:
                continue
            try:
                pair = _pair(sample, self._buckets)
            except BadPair as problem:
                logging.warning("edit pair %s: %s", sample.name, problem)
                self.bad.append((number, f"{sample.name}: {problem}"))
                too_many_bad(self.where, self.bad, self.total or self.seen, self.total or FIRST_OF_A_STREAM)
            else:
                self.numbers.append(number)
                yield pair
        if not self.seen:
            raise ValueError(f"no edit pairs in {self.where}")
        too_many_bad(self.where, self.bad, self.seen)


def too_many_bad(where: str, bad: Sequence[tuple[int, str]], samples: int, at_least: int = 0) -> None:
    """Raises ValueError, naming the first, if more than 1% of the samples and at least two are bad, or all.

    at_least: count on so many samples although fewer have been seen.
    """
    reckoned = max(samples, at_least)
    if len(bad) > max(1.0, BAD_SHARE * reckoned) or len(bad) == reckoned:
        raise ValueError(
            f"{len(bad)} of {samples} edit pairs in {where} cannot be used, more than 1%; "
            f"the first is {min(bad)[1]}"
        )


def read_folder(folder: Path, resolution: int, step: int) -> Reading:
    """Every usable pair of a folder, by name, scaled and cropped to its bucket.

    Raises ValueError for a folder without pairs.
    """
    samples = folder_samples(folder)
    return Reading(folder.name, samples, resolution, step, len(samples))


def write_pair(
    folder: Path, name: str, before: torch.Tensor, after: torch.Tensor, *, source: str, edit: str
) -> None:
    """Write a pair as `read_folder` reads it. The texts come last, so that no half pair is ever read.

    before, after: [height, width, 3], 0 to 1.
    source, edit: the descriptions of both.
    """
    save_image(to_image(before), folder / f"{name}_source.png")
    save_image(to_image(after), folder / f"{name}_edit.png")
    texts = json.dumps({"source": source, "edit": edit}, indent=1, ensure_ascii=False)
    write_bytes(folder / f"{name}.json", texts.encode())


def folder_samples(folder: Path) -> list[Sample]:
    """The samples of a folder, by name. Raises ValueError if there are none."""
    files: dict[tuple[str, str], Path] = {}
    for file in sorted(
        folder.iterdir()
    ):  # of two names that differ in case, the one with the lower-case extension
        if not file.name.startswith("."):  # such as macOS's metadata files
            files[file.stem, file.suffix.lower()] = file
    names = sorted(stem for stem, suffix in files if suffix == ".json")
    if not names:
        raise ValueError(
            f"no edit pairs in {folder.name}: it needs name_source.png, name_edit.png and name.json for each"
        )
    return [Sample(name, partial(_folder_parts, files, name)) for name in names]


def _folder_parts(files: Mapping[tuple[str, str], Path], name: str) -> Parts:
    try:
        texts = json.loads(decoded_text(files[name, ".json"].read_bytes()))
        source_text, edit_text = texts["source"], texts["edit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadPair(f'its JSON has no "source" and "edit" texts ({error})') from None
    pictures = []
    for stem in (f"{name}_source", f"{name}_edit"):
        path = next((files[stem, suffix] for suffix in SUFFIXES if (stem, suffix) in files), None)
        if path is None:
            raise BadPair(f"there is no {stem}.png")
        pictures.append(Picture(path.name, partial(Image.open, path)))
    return Parts(*pictures, source_text, edit_text)


def decoded_text(content: bytes) -> str:
    """Decodes UTF-8, 16 or 32, with or without a byte order mark.

    Raises ValueError for other encodings.
    """
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error}): save it as UTF-8") from None


def buckets(resolution: int, step: int) -> list[Size]:
    """Sizes (height, width) of about resolution x resolution pixels in multiples of `step`, 1:2 to 2:1."""
    found = set()
    for height in range(step, 2 * resolution + 1, step):
        width = max(step, round(resolution * resolution / height / step) * step)
        if max(height, width) <= 2 * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found)


def fitted(picture: torch.Tensor, size: Size) -> torch.Tensor:
    """[height, width, 3], scaled to cover `size` and centre-cropped to it."""
    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture
    scale = max(size[0] / height, size[1] / width)
    covering = math.ceil(height * scale - 1e-6), math.ceil(width * scale - 1e-6)
    image = resize(rearrange(picture, "h w c -> 1 c h w"), covering, antialias=True)
    return rearrange(center_crop(image, size), "1 c h w -> h w c").clamp(0, 1)


def _pair(sample: Sample, sizes: Sequence[Size]) -> EditPair:
    parts = sample.parts()
    texts = parts.source_text, parts.edit_text
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadPair("a description is empty")
    source, edit = _decoded(parts.source), _decoded(parts.edit)
    if source.shape != edit.shape:
        found = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (source, edit)]
        raise BadPair(f"the source is {found[0]} and the edit {found[1]}")
    shape = math.log(source.shape[0] / source.shape[1])
    size = min(sizes, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))
    return EditPair(sample.name, fitted(source, size), fitted(edit, size), *texts)


def _decoded(picture: Picture) -> torch.Tensor:
    """[height, width, 3], 0 to 1, upright. Transparent areas become white, so that no invisible colour is
    learned.
    """
    try:
        with picture.open() as file:
            mode, frames = file.mode, 1 if file.format in ONE_PICTURE else getattr(file, "n_frames", 1)
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data and mode[0] not in WIDE:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    except Exception as error:  # Pillow raises almost any exception for broken bytes
        raise BadPair(f"{picture.name} cannot be read ({error})") from None
    if mode[0] in WIDE:  # Pillow would clip it
        raise BadPair(f"{picture.name} has {mode} pixels but must have 8 bits per channel")
    if frames > 1:
        raise BadPair(f"{picture.name} is an animation of {frames} frames but must be one image")
    if min(pixels.shape[:2]) < SMALLEST:
        raise BadPair(f"{picture.name} is smaller than {SMALLEST} pixels")
    return torch.from_numpy(pixels)


def batches(sizes: Sequence[Size], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches of pair numbers, each of one image size, shuffled; the same for the same seed and
    epoch.

    Pairs that do not fill a batch are left out of this epoch. If a size has less than one batch, some of its
    pairs are repeated.
    """
    rng = np.random.default_rng([seed, epoch])
    found = []
    for size in sorted(set(sizes)):
        members = rng.permutation([number for number, other in enumerate(sizes) if other == size])
        if len(members) < batch:
            members = np.resize(members, batch)
        found += [members[i : i + batch].tolist() for i in range(0, len(members) - batch + 1, batch)]
    return [found[i] for i in rng.permutation(len(found))]
