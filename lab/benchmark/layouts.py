"""Readers of benchmarks in their published layouts. Nothing is downloaded."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...models.tiny_studio import scenes
from ...training.pairs import Picture
from .cases import PICTURES, Case, Drawn, distinct, file_picture, from_values, read_folder, read_json

TUNING_SEED = 1_000_000  # far from the seeds of the training pairs
PIE_SIDE = 512
PIE_TYPES = (
    *("random", "change object", "add object", "delete object", "change content", "change pose"),
    *("change colour", "change material", "change background", "change style"),
)


def _rows(folder: Path, split: str) -> Any:
    """A Hugging Face data set on this disk, with encoded images.

    folder: of `save_to_disk`, or of parquet files named after their split.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ImportError("this layout needs datasets: pip install -r lab/requirements.txt") from None
    files = sorted(str(path) for path in folder.rglob(f"{split}-*.parquet"))
    try:
        if files:
            found = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            found = datasets.load_from_disk(str(folder))
            found = found[split] if isinstance(found, dict) else found
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{folder} holds neither {split}-*.parquet nor a data set with the split {split} ({error})"
        ) from None
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


def _column(rows: Any, number: int, name: str) -> Picture:
    def load() -> Image.Image:
        value = rows[number][name]
        return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"])

    return Picture(f"{name} of row {number}", load)


def _light(rows: Any, needed: tuple[str, ...]) -> Any:
    """The columns without images. Raises ValueError if a required column is missing."""
    missing = sorted(set(needed) - set(rows.column_names))
    if missing:
        raise ValueError(
            f"the data set has no column {', '.join(missing)} but {', '.join(rows.column_names)}"
        )
    pictures = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    return rows.remove_columns(pictures)


def read_dataset(folder: Path, split: str) -> Iterator[Case]:
    """A Hugging Face data set with the names of a benchmark folder's `cases.jsonl` as columns."""
    rows = _rows(folder, split)
    light = _light(rows, ("id", "type", "source_image", "source_description", "edit_description"))
    given = {name: rows.data[name].is_valid().to_pylist() for name in PICTURES if name in rows.column_names}
    for number, values in enumerate(light):
        pictures = {name: name for name, valid in given.items() if valid[number]}
        yield from_values(f"row {number}", {**values, **pictures}, partial(_column, rows, number))


def read_emu_edit(folder: Path, split: str) -> Iterator[Case]:
    """The Emu Edit test set, huggingface.co/datasets/facebook/emu_edit_test_set, with its two captions.

    It has no masks and no true edits, so edits are compared with their source.
    """
    rows = _rows(folder, split)
    needed = ("instruction", "image", "task", "input_caption", "output_caption")
    for number, row in enumerate(_light(rows, needed)):
        yield Case(
            f"{split}-{number:05}",
            row["task"] or "no task",
            f"row {number}",
            _column(rows, number, "image"),
            row["input_caption"] or "",
            row["output_caption"] or "",
            row["instruction"] or "",
        )


def read_magicbrush(folder: Path, split: str) -> Iterator[Case]:
    """MagicBrush's test or dev folder (arXiv 2306.10012).

    It holds `edit_sessions.json`, `global_descriptions.json` and `images/ID/...`. Each turn is a separate
    case that starts from the true image before it: the paper's single-turn setting. The edit type is the
    turn. The edit region is the transparent part of a mask, or the white part if nothing is transparent.
    """
    folder = folder / split if (folder / split).is_dir() else folder
    sessions = read_json(folder / "edit_sessions.json")
    texts = read_json(folder / "global_descriptions.json")
    for image, turns in sessions.items():
        for number, turn in enumerate(turns, start=1):
            origin = f"edit_sessions.json {image} turn {number}"
            try:
                source, mask, target = (
                    file_picture(folder / "images" / image, turn[name])
                    for name in ("input", "mask", "output")
                )
                before, after = (texts[image][turn[name]] for name in ("input", "output"))
                yield Case(
                    f"{image}-{number}",
                    f"turn {number}",
                    origin,
                    source,
                    before,
                    after,
                    turn["instruction"],
                    Picture(mask.name, partial(_transparent, mask.open)),
                    target,
                )
            except (KeyError, TypeError) as error:
                raise ValueError(f"{origin}: there is no {error}") from None


def _transparent(load: Callable[[], Image.Image]) -> Image.Image:
    with load() as picture:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] == 255:
            return picture.convert("L")
        return alpha.point([255] * 255 + [0])


def read_pie_bench(folder: Path, split: str) -> Iterator[Case]:
    """PIE-Bench (arXiv 2310.01506): `mapping_file.json` and `annotation_images/...`; it has no splits.

    Its masks are runs, start and length, over 512x512 pixels row by row. The outermost pixels count as
    edited, as in its authors' evaluation. Brackets in its descriptions mark the words that differ; they are
    removed.
    """
    for key, entry in read_json(folder / "mapping_file.json").items():
        origin = f"mapping_file.json {key}"
        try:
            kind = int(entry["editing_type_id"])
            source, edit = (
                entry[name].replace("[", "").replace("]", "")
                for name in ("original_prompt", "editing_prompt")
            )
            yield Case(
                key,
                f"{kind} {PIE_TYPES[kind]}",
                origin,
                file_picture(folder / "annotation_images", entry["image_path"]),
                source,
                edit,
                entry.get("editing_instruction", "").replace("[", "").replace("]", ""),
                Picture(f"mask of {key}", partial(pie_mask, entry["mask"])),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{origin}: not an entry of PIE-Bench ({error!r})") from None


def pie_mask(runs: list[int]) -> Image.Image:
    """A mask of PIE-Bench as an image, white in the edit region."""
    mask = np.zeros(PIE_SIDE * PIE_SIDE, np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=False):
        mask[start : start + length] = 255
    mask = mask.reshape(PIE_SIDE, PIE_SIDE)
    mask[[0, -1]] = mask[:, [0, -1]] = 255
    return Image.fromarray(mask)


def read_unify_bench(folder: Path, split: str) -> Iterator[Case]:
    """Unify-Bench (arXiv 2504.05594, Table I); it has no splits.

    It has folders color_sim, color_cmp, texture_sim, texture_cmp, obj_sim, obj_cmp, background, style, human;
    for each image two prompts and a mask, "None" for a style. Its files are not published beyond that. This
    reads `prompts.json` in each of the folders: {"fox.png": {"source_prompt": ..., "target_prompt": ...,
    "mask": "fox_mask.png"}}.
    """
    files = sorted(folder.glob("*/prompts.json"))
    if not files:
        raise ValueError(f"{folder} has no folder with a prompts.json")
    for file in files:
        for name, entry in read_json(file).items():
            group, origin = file.parent, f"{file.parent.name}/prompts.json {name}"
            try:
                mask = entry["mask"]
                yield Case(
                    f"{group.name}/{Path(name).stem}",
                    group.name,
                    origin,
                    file_picture(group, name),
                    entry["source_prompt"],
                    entry["target_prompt"],
                    mask=None if mask in (None, "None") else file_picture(group, mask),
                )
            except (KeyError, TypeError) as error:
                raise ValueError(f"{origin}: there is no {error}") from None


def draw_tiny_studio(folder: Path | None, split: str) -> Iterator[Case]:
    """Drawn edits of the Tiny Studio's scenes, half of them with short descriptions.

    The split `test` has 50 cases of each edit type, with combinations of attributes that no training saw. The
    split `tuning` has 60 of each, with combinations from training, but other scenes: the first 10 of each
    type, then the next 10, then the others.
    """
    yield from _drawn_cases(scenes.EDIT_TYPES, split, 50, 10, 20)
    if split == "tuning":
        yield from _drawn_cases(scenes.EDIT_TYPES, split, 50, 10, 40, skipped=10)
        yield from _drawn_cases(scenes.EDIT_TYPES, split, 50, 40, 60, skipped=20)


def draw_two_objects(folder: Path | None, split: str) -> Iterator[Case]:
    """The same with scenes of two objects, one of which changes: 100 cases and 20."""
    return _drawn_cases((scenes.TWO,), split, 100, 20, 30)


def _drawn_cases(
    types: Sequence[str], split: str, test: int, tuning: int, seed: int, skipped: int = 0
) -> Iterator[Case]:
    """`test` or `tuning` cases of each type after `skipped`. seed: of their noise, and the next one."""
    if split not in ("test", "tuning"):
        raise ValueError(f"tiny-studio has the splits test and tuning, not {split!r}")
    held, per_type, first = (True, test, 0) if split == "test" else (False, tuning, TUNING_SEED)
    numbers = [(edit_type, number) for edit_type in types for number in range(skipped, skipped + per_type)]
    noise = torch.randn(len(numbers), 4, 16, 16, generator=torch.Generator().manual_seed(seed + held))
    for (edit_type, number), start in zip(numbers, noise, strict=True):
        pair = scenes.sample_edit(edit_type, first + number, scenes.WORDINGS[number % 2], held)
        yield Case(
            f"{edit_type}-{number:03}",
            edit_type,
            f"drawn {edit_type} {number}",
            Picture("source", partial(_drawn, pair.source.draw)),
            pair.source_text,
            pair.edit_text,
            scenes.instruction(pair),
            None if edit_type == "style" else Picture("mask", partial(_drawn, pair.mask)),
            Picture("target", partial(_drawn, pair.target.draw)),
            Drawn(pair, start),
        )


def _drawn(draw: Callable[[], Any]) -> Image.Image:
    return Image.fromarray((draw() * 255).round().astype(np.uint8))


DRAWN: Mapping[str, Callable[[Any, str], Any]] = {
    "tiny-studio": draw_tiny_studio,
    "tiny-studio-two": draw_two_objects,
}
LAYOUTS: Mapping[str, Callable[[Any, str], Any]] = {
    "folder": lambda folder, split: read_folder(folder),
    "dataset": read_dataset,
    "emu-edit": read_emu_edit,
    "unify-bench": read_unify_bench,
    "pie-bench": read_pie_bench,
    "magicbrush": read_magicbrush,
    **DRAWN,
}


def read_cases(layout: str, folder: Path | None, split: str) -> list[Case]:
    """The cases of a benchmark. Raises ValueError if it has another layout, or two cases with one id."""
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if folder is None and layout not in DRAWN:
        raise ValueError(f"the layout {layout} needs --data, the folder of the benchmark")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return distinct(LAYOUTS[layout](folder, split))
