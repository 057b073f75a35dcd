"""A small training run on the Tiny Studio, as a configuration, and batches, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from host import Host
from PIL import Image

STEPS = 6


def batch_of(
    host: Host,
    source: torch.Tensor,
    edit: torch.Tensor,
    source_text: torch.Tensor,
    edit_text: torch.Tensor,
    empty_text: torch.Tensor,
    white: torch.Tensor,
) -> Any:
    """A batch of these latents, and of embeddings [pairs, tokens, width] whose mean is their pooled text."""
    text = host.pack_module("training.texts").Text
    texts = ([text(row[None], row[None].mean(1)) for row in rows] for rows in (source_text, edit_text))
    empty = text(empty_text, empty_text.mean(1))
    return host.pack_module("training.objective").Batch(source, edit, *texts, empty, white)


def settings(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A small run on the Tiny Studio; `changes` by dotted names with __ for the dots."""
    tree: dict[str, Any] = {
        "base": "tiny_studio",
        "data": {"path": str(data / "pairs"), "resolution": 64},
        "output": str(output),
        "cache": str(data / "encoded"),
        "steps": STEPS,
        "bridge": {"rank": 4, "alpha": 4.0},
        "train": {"batch": 2, "learning_rate": 1e-3, "ema": 0.5},
        "checkpoint": {"every": 1, "keep": 2},
        "validation": {"every": 0},
        "logging": {"every": 2, "tensorboard": False},
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def write_pairs(folder: Path) -> Path:
    """Six edit pairs in the folder's `pairs`; returns the folder."""
    rng = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    for number in range(6):
        for role in ("source", "edit"):
            colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(colours).resize((64, 64))
            picture.save(folder / "pairs" / f"{number}_{role}.png")
        texts = {"source": f"a red circle {number}", "edit": f"a green square {number}"}
        (folder / "pairs" / f"{number}.json").write_text(json.dumps(texts))
    return folder
