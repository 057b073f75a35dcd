"""Save Edit Pair: what any graph edits becomes a folder that Edit Pairs from Folder reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host import Host
from PIL import Image

TEXTS = {"source_description": " a red circle ", "edit_description": "绿色的圆"}


def pictures(images: int = 1, seed: int = 1) -> torch.Tensor:
    made = torch.randint(0, 256, (images, 64, 96, 3), generator=torch.Generator().manual_seed(seed))
    return made / 255


def save(host: Host, folder: str, **inputs: Any) -> list[str]:
    given = {"source": pictures(), "edited": pictures(seed=2), **TEXTS, "folder": folder, **inputs}
    return host.execute("DescEditSavePair", **given)[0].split("\n")


def files(host: Host, folder: str) -> list[str]:
    return sorted(path.name for path in (host.base / "input" / folder).iterdir())


def test_a_pair(host: Host) -> None:
    """Protects: a pair's pictures, to the bit of a PNG, and its texts, in any script, under their names."""
    assert save(host, "made/one") == ["pair_00001"]
    folder = host.base / "input" / "made" / "one"
    assert files(host, "made/one") == ["pair_00001.json", "pair_00001_edit.png", "pair_00001_source.png"]
    texts = json.loads((folder / "pair_00001.json").read_text(encoding="utf-8"))
    assert texts == {"source": "a red circle", "edit": "绿色的圆"}
    for name, seed in (("source", 1), ("edit", 2)):
        with Image.open(folder / f"pair_00001_{name}.png") as picture:
            assert np.array_equal(np.asarray(picture), (pictures(seed=seed)[0] * 255).round().byte().numpy())


def test_numbers_count_up(host: Host) -> None:
    """Protects: nothing is overwritten: batches, later runs and what others left in the folder."""
    assert save(host, "counted", source=pictures(2), edited=pictures(2, 5)) == ["pair_00001", "pair_00002"]
    folder = host.base / "input" / "counted"
    (folder / "pair_00007_source.png").write_bytes(b"left behind")
    (folder / "mine.json").write_text("{}")
    assert save(host, "counted") == ["pair_00008"]
    assert (folder / "pair_00007_source.png").read_bytes() == b"left behind"


def test_the_training_reads_them(host: Host, tmp_path: Path) -> None:
    """Protects: what the node writes is what the training's reader finds, texts and pixels."""
    save(host, "read")
    (pair,) = host.pack_module("training.pairs").read_folder(host.base / "input" / "read", 96, 64)
    assert (pair.source_text, pair.edit_text) == ("a red circle", "绿色的圆")
    assert pair.source.shape == pair.edit.shape == (64, 128, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"edit_description": " "}, "edit_description is empty: describe what the image shows"),
        ({"edited": pictures()[:, :32]}, r"edited has shape \[1, 32, 96, 3\] but source \[1, 64, 96, 3\]"),
        ({"folder": "../elsewhere"}, "folder is '../elsewhere' but must be a folder inside ComfyUI's input"),
        ({"folder": " "}, "folder is ' ' but must be a folder inside"),
    ],
    ids=["no text", "sizes", "outside", "no folder"],
)
def test_refusals(host: Host, inputs: dict[str, Any], message: str) -> None:
    """Protects: a pair that the training could not use, and a folder elsewhere, are refused before a file is
    written.
    """
    with pytest.raises(ValueError, match=f"Save Edit Pair: {message}"):
        save(host, **{"folder": "refused", **inputs})
    assert not (host.base / "input" / "refused").exists()
    assert not (host.base / "elsewhere").exists()
