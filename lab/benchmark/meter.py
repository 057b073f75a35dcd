"""What an edit scores: every figure of `metrics.image`, and the Tiny Studio's judge where it applies."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import numpy as np
import torch
from PIL import Image

from ...metrics.backbones import ClipSimilarity, ClipText, DinoSimilarity, StructureDistance
from ...metrics.image import Network, measure_edit
from ...metrics.lpips import Lpips
from ...models.tiny_studio import drawing
from ..tiny_studio import attribute_classifier as judge
from .cases import Case, CaseError
from .engine import Outcome
from .methods import Method
from .results import Line, save_picture

NETWORKS = ("lpips", "dino_i", "structure_distance", "clip_i", "clip_t")


class Meter:
    """Measures edits with the networks that are there.

    clip_vision, clip: files of the two halves of one CLIP. missing: for each network that is not there, why.
    """

    def __init__(self, clip_vision: Path | None = None, clip: Path | None = None) -> None:
        self.missing: dict[str, str] = {}
        self._networks: dict[str, Network] = {}
        self._load("lpips", Lpips)
        self._load("dino_i", DinoSimilarity)
        self._load("structure_distance", StructureDistance)
        self._vision = self._clip = None
        if clip_vision is None:
            self.missing |= dict.fromkeys(("clip_i", "clip_t"), "no CLIP was given: --clip-vision FILE")
        else:
            self._vision = comfy.clip_vision.load(str(clip_vision))
            self._load("clip_i", lambda: ClipSimilarity(self._vision))
            if clip is None:
                self.missing["clip_t"] = "no text half of the CLIP was given: --clip FILE"
            else:
                self._clip = comfy.sd.load_clip([str(clip)])
                self._load("clip_t", lambda: ClipText(self._vision, self._clip, "a picture"))
        self._text = self._networks.pop("clip_t", None) is not None
        self._judge: judge.AttributeClassifier | None = None

    def _load(self, name: str, make: Callable[[], Network]) -> None:
        try:
            self._networks[name] = make()
        except ValueError as problem:
            self.missing[name] = str(problem)

    @torch.inference_mode()
    def measure(self, case: Case, edited: Image.Image) -> dict[str, float | None]:
        """The figures against the source, `target_...` against the true edit, and `success`.

        success: whether the judge reads every attribute as the edit wants it, 1 or 0. None stands for a
        region that is empty. Raises CaseError, or ValueError for sizes that do not belong together.
        """
        picture, source, target = (
            _image(image) for image in (edited, case.read("source_image"), case.read("target_image"))
        )
        white = _image(case.read("mask"))
        mask = None if white is None else white[..., 0]
        text = {}
        if self._text and case.edit_description:
            text["clip_t"] = ClipText(self._vision, self._clip, case.edit_description)
        found = measure_edit(picture, source, target, mask, self._networks, text)
        numbers = {name: values.item() for name, values in found.items()}
        if case.expected is not None:
            self._judge = self._judge or judge.load()
            seen = edited.resize((drawing.SIZE, drawing.SIZE))
            (read,) = self._judge.read_as([case.expected["kind"]], _image(seen))
            numbers["success"] = float(read == case.expected)
        return {name: None if math.isnan(value) else value for name, value in numbers.items()}

    def line(self, folder: Path, method: Method, case: Case, outcome: Outcome) -> Line:
        """The result of an edit, whose picture is put into the run's folder."""
        line = {
            "method": method.label,
            "name": method.name,
            "swept": method.swept,
            "case": case.id,
            "type": case.edit_type,
            "seconds": round(outcome.seconds, 3),
            "figures": {},
        }
        error = outcome.error
        if outcome.picture is not None:
            save_picture(folder, method.label, case.id, outcome.picture)
            try:
                line["figures"] = self.measure(case, outcome.picture)
            except (CaseError, ValueError) as problem:
                error = str(problem)
        return {**line, "error": error} if error else line


def _image(picture: Image.Image | None) -> torch.Tensor | None:
    """[1, height, width, channels], 0 to 1."""
    if picture is None:
        return None
    pixels = np.asarray(picture, np.float32) / 255
    return torch.from_numpy(pixels.reshape(1, *picture.size[::-1], -1))
