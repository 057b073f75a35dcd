"""`dev.py edit`: what it makes of a photo with a checkpoint, and the words it warns of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host import Host
from PIL import Image


class FakeServer:
    """Takes the prompt, and runs it in here with the Tiny Studio in the place of the checkpoint."""

    def __init__(self, host: Host) -> None:
        self.host, self.base = host, host.base
        self.prompt: dict[str, Any] = {}

    def run(self, prompt: dict[str, Any], progress: Any) -> dict[str, Any]:
        self.prompt = prompt
        stand_in = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
        for node in stand_in.values():
            if node["class_type"] == "CheckpointLoaderSimple":
                assert (
                    self.base / "models" / "checkpoints" / node["inputs"]["ckpt_name"]
                ).read_bytes() == b"x"
                node["class_type"], node["inputs"] = "DescEditTinyStudio", {}
            if node["class_type"] == "DescEditUnify":
                node["inputs"]["steps"] = 2
            if node["class_type"] == "DescEditCrop":
                node["inputs"]["side"] = 64
        outputs = self.host.run_graph(stand_in)
        (key,) = [key for key, node in prompt.items() if node["class_type"] == "DescEditStitch"]
        self.edited = outputs[key][0][0]
        (saved,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
        return {saved: {"images": [{}]}}

    def image(self, entry: dict[str, str]) -> bytes:
        stream = io.BytesIO()
        Image.fromarray((self.edited * 255).round().byte().numpy()).save(stream, "png")
        return stream.getvalue()


def test_photo_with_a_checkpoint(host: Host, tmp_path: Path) -> None:
    """Protects: with --checkpoint a photo keeps its size, and outside the given mask every pixel."""
    edit, options = host.pack_module("lab.edit"), host.pack_module("lab.edit_options")
    pixels = np.random.default_rng(1).integers(0, 256, (90, 150, 3), np.uint8)
    mask = np.zeros((90, 150), np.uint8)
    mask[30:60, 50:100] = 255
    for name, array in (("photo.png", pixels), ("mask.png", mask)):
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    texts = ["--source", "a red circle", "--edit", "a blue circle"]
    files = ["--image", "photo.png", "--mask", "mask.png", "--checkpoint", "mine.safetensors"]
    given = options.parse([*(str(tmp_path / text) if "." in text else text for text in files), *texts])
    server = FakeServer(host)
    workflow = edit.json.loads(edit.PHOTO.read_text(encoding="utf-8"))
    made = edit.run_photo(server, workflow, given, edit.read_pictures(given))
    assert made.edited.shape == made.source.shape == (90, 150, 3)
    outside = torch.from_numpy(mask) == 0
    assert torch.equal(made.edited[outside], made.source[outside])
    assert not torch.equal(made.edited, made.source)


def test_unknown_words(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects: words without effect are named in one line; none for known ones."""
    warn = host.pack_module("lab.edit").warn_of_words
    warn("a photo of a red circle", "a blue circle on a photo")
    assert capsys.readouterr().err == "dev.py edit: the Tiny Studio does not know: photo\n"
    warn("a red circle", "a large blue circle")
    assert capsys.readouterr().err == ""
