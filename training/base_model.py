"""Loads the base model of a bridge in parts: first the encoders, then only the UNet."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ..models.tiny_studio import studio
from ..patches.host.autograd import weights_streamed
from .cache import file_fingerprint
from .objective import check_trainable

TINY_STUDIO = "tiny_studio"
_PARTS = {"model": "UNet", "clip": "text encoder", "vae": "VAE"}


class BaseModelLoader:
    """source: a checkpoint file, or `tiny_studio`.

    Raises ValueError if the file does not exist. Its methods raise ValueError if the file lacks what they
    load.
    """

    def __init__(self, source: str) -> None:
        tiny = source == TINY_STUDIO
        self.file = studio.FILE if tiny else Path(source)
        self._load = _studio_part if tiny else partial(_checkpoint_part, self.file)
        if not self.file.is_file():
            raise ValueError(f"base is {source!r} but must be a checkpoint file, or {TINY_STUDIO}")

    def fingerprint(self) -> str:
        """Name and content of the file."""
        return f"{self.file.name} {file_fingerprint(self.file)}"

    def encoders(self) -> tuple[comfy.sd.VAE, comfy.sd.CLIP]:
        clip = self._load("clip")
        return self._load("vae"), clip

    def vae(self) -> comfy.sd.VAE:
        return self._load("vae")

    def unet(self, dtype: torch.dtype) -> ModelPatcher:
        """The UNet on the host's device, frozen. dtype: of its weights."""
        model = self._load("model", dtype=dtype)
        check_trainable(model)
        model.model.requires_grad_(False)
        to_device(model)
        return model


def _studio_part(part: str, **options: Any) -> Any:
    if part == "model":
        return studio.load_model(disable_dynamic=True, **options)
    return {"clip": studio.load_clip, "vae": studio.load_vae}[part]()


def _checkpoint_part(file: Path, part: str, **options: Any) -> Any:
    wanted = {f"output_{name}": name == part for name in _PARTS}
    try:
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(file), **wanted, model_options=options, disable_dynamic=True
        )
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file.name} cannot be loaded as a checkpoint: {reason}") from error
    found = {"model": model, "clip": clip, "vae": vae}[part]
    if found is None or getattr(found, "first_stage_model", found) is None:  # the host's VAE without weights
        raise ValueError(f"{file.name} has no {_PARTS[part]}: take a whole checkpoint")
    return found


def to_device(model: ModelPatcher) -> None:
    """Move a whole model to its device, whatever the host has moved away.

    Raises RuntimeError if the host keeps a part of it elsewhere, as with dynamic VRAM: autograd would then
    keep weights that are gone by the backward pass.
    """
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    if weights_streamed([model]):
        raise RuntimeError(
            "the host did not put all of the model on its device: training from the command line needs a "
            "model without dynamic VRAM, loaded in full"
        )


def free() -> None:
    """Free memory for the next part: unload everything from the GPU."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
