"""Samples fixed edits during training and draws them: what the bridge has learned so far."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ..models.bridge import manage
from ..patches.bridge.apply import apply_bridge
from ..patches.bridge.guidance import AUTOMATIC, DualGuidance, DualGuider
from ..patches.bridge.run import BridgeSetup
from ..pictures.contact_sheet import draw_sheet, to_image
from .base_model import BaseModelLoader, to_device
from .cache import EncodedPairs
from .config import ValidationConfig
from .pairs import EditPair
from .settings import DataConfig
from .sources import read_pairs
from .trainer import Trainer


def validation_data(data: DataConfig, settings: ValidationConfig) -> DataConfig:
    """The source of the fixed edits: their own folder, or the training data."""
    if not settings.folder:
        return data
    return replace(data, kind="folder", path=settings.folder, columns={}, limit=0)


@dataclass(frozen=True, eq=False)
class Validation:
    """Fixed edits.

    edits: images and texts.
    pairs: the same, encoded, from the first on.
    """

    settings: ValidationConfig
    edits: Sequence[EditPair]
    pairs: EncodedPairs

    @classmethod
    def of(cls, settings: ValidationConfig, data: DataConfig, pairs: EncodedPairs) -> Validation:
        """The first pairs of `data`, whose encoded ones are `pairs`."""
        return cls(settings, list(itertools.islice(read_pairs(data), settings.count)), pairs)

    def picture(self, trainer: Trainer, model: ModelPatcher, base: BaseModelLoader) -> Image.Image:
        """Source, target and what is sampled with the averaged bridge, a row for each edit.

        model: the one that is trained on, which is on its device again afterwards.
        """
        managed = manage(trainer.learned())
        try:
            with torch.inference_mode():
                latents = [self._sample(number, model, managed) for number in range(len(self.edits))]
                vae = base.vae()
                sampled = [vae.decode(latent).flatten(0, -4)[0].clamp(0, 1) for latent in latents]
                del vae
        finally:
            to_device(model)
        columns = [
            ("source", [edit.source for edit in self.edits]),
            ("target", [edit.edit for edit in self.edits]),
            (f"after step {trainer.step}", sampled),
        ]
        captions = [[edit.source_text, edit.edit_text, ""] for edit in self.edits]
        side = max(max(edit.source.shape[:2]) for edit in self.edits)
        return to_image(draw_sheet(columns, side, captions)[0])

    def _sample(self, number: int, model: ModelPatcher, bridge: ModelPatcher) -> torch.Tensor:
        """A latent in the VAE's scale, from noise that is the same every time."""
        pair = self.pairs.batch([number], torch.device("cpu"), lambda latent: latent)
        setup = BridgeSetup(bridge, pair.source, pair.source_text[0].conditioning())
        guidance = DualGuidance(self.settings.image_guidance, self.settings.text_guidance, AUTOMATIC).on(
            model
        )
        guider = DualGuider(apply_bridge(model, setup), guidance)
        guider.set_conds(pair.edit_text[0].conditioning(), pair.empty_text.conditioning())
        noise = torch.randn(pair.source.shape, generator=torch.Generator().manual_seed(number))
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "normal", self.settings.steps
        )
        sampler = comfy.samplers.sampler_object("euler")
        start = torch.zeros_like(pair.source)
        return guider.sample(noise, start, sampler, sigmas, disable_pbar=True, seed=number)
