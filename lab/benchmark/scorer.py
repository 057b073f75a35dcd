"""The metrics of an edit: those of `metrics.image`, and `success` for the Tiny Studio's scenes."""

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
from ..tiny_studio.attribute_classifier import shows
from .cases import Case, CaseError
from .comfy_worker import Outcome
from .methods import Method
from .results import Metrics, Result, new_result, save_picture

NETWORKS = ("lpips", "dino_i", "structure_distance", "clip_i", "clip_t")


class Scorer:
    """Measures edits with the networks whose files are available.

    clip_vision, clip: files of the two halves of one CLIP.
    missing: the reason for each missing network.
    judges_text: whether there is CLIP-T.
    """

    def __init__(self, clip_vision: Path | None = None, clip: Path | None = None) -> None:
        self.missing: dict[str, str] = {}
        self.networks: dict[str, Network] = {}
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
        self.judges_text = self.networks.pop("clip_t", None) is not None

    def _load(self, name: str, make: Callable[[], Network]) -> None:
        try:
            self.networks[name] = make()
        except ValueError as problem:
            self.missing[name] = str(problem)

    @torch.inference_mode()
    def measure(self, case: Case, edited: Image.Image) -> Metrics:
        """Metrics against the source, `target_...` against the true edit, and `success`, 1 or 0.

        Raises CaseError, or ValueError for sizes that do not fit together.
        """
        image, source = to_tensor(edited), to_tensor(case.source())
        target, mask = (
            None if picture is None else to_tensor(picture)
            for picture in (case.read("target_image"), case.read("mask"))
        )
        region = None if mask is None else mask[..., 0]
        text = {}
        if self.judges_text and case.edit_description:
            text["clip_t"] = ClipText(self._vision, self._clip, case.edit_description)
        (metrics,) = as_rows(measure_edit(image, source, target, region, self.networks, text))
        if case.drawn is not None:
            resized = to_tensor(edited.resize((drawing.SIZE, drawing.SIZE)))
            metrics["success"] = float(shows(resized, [case.drawn.pair.target])[0])
        return metrics

    def result(self, folder: Path, method: Method, case: Case, outcome: Outcome) -> Result:
        """The result of an edit, whose image is saved in the run's folder."""
        metrics, error = {}, outcome.error
        if outcome.picture is not None:
            save_picture(folder, method.label, case.id, outcome.picture)
            try:
                metrics = self.measure(case, outcome.picture)
            except (CaseError, ValueError) as problem:
                error = str(problem)
        return new_result(method, case, outcome.seconds, metrics, error)


def as_rows(found: dict[str, torch.Tensor]) -> list[Metrics]:
    """Metrics by image instead of images by metric; nan, an empty region, becomes None."""
    return [
        {name: None if math.isnan(value) else value for name, value in zip(found, values, strict=True)}
        for values in zip(*(values.tolist() for values in found.values()), strict=True)
    ]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """[1, height, width, channels], 0 to 1."""
    pixels = np.asarray(picture, np.float32) / 255
    return torch.from_numpy(pixels.reshape(1, *picture.size[::-1], -1))
