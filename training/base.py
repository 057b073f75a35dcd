"""The base model that a bridge is trained for, in parts: the encoders first, then the UNet alone."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..models.sites import find_sites
from ..models.tiny_studio import studio
from ..patches.host.autograd import weights_streamed
from .cache import file_fingerprint
from .objective import check_trainable

TINY_STUDIO = "tiny_studio"


@dataclass(frozen=True)
class Base:
    """source: a checkpoint file, or `tiny_studio`.

    Raises ValueError if there is no such file, and from its methods if it does not hold what they load.
    """

    source: str

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise ValueError(f"base is {self.source!r} but must be a checkpoint file, or {TINY_STUDIO}")

    @property
    def file(self) -> Path:
        return studio.FILE if self.source == TINY_STUDIO else Path(self.source)

    def fingerprint(self) -> str:
        """Name and content of the file."""
        return f"{self.file.name} {file_fingerprint(self.file)}"

    def encoders(self) -> tuple[Any, Any]:
        """VAE and CLIP."""
        if self.source == TINY_STUDIO:
            return studio.load_vae(), studio.load_clip()
        _, clip, vae = self._load(output_clip=True, output_vae=True)
        if clip is None or vae is None:
            missing = "VAE" if clip else "text encoder"
            raise ValueError(f"{self.file.name} has no {missing}: take a whole checkpoint")
        return vae, clip

    def vae(self) -> Any:
        if self.source == TINY_STUDIO:
            return studio.load_vae()
        return self._load(output_vae=True)[2]

    def unet(self, dtype: torch.dtype) -> Any:
        """A ModelPatcher on the GPU if there is one, frozen. dtype: of its weights."""
        if self.source == TINY_STUDIO:
            model = studio.load_model(disable_dynamic=True, dtype=dtype)
        else:
            model, *_ = self._load(output_model=True, model_options={"dtype": dtype})
        if model is None:
            raise ValueError(f"{self.file.name} has no UNet: take a whole checkpoint")
        find_sites(model.model.diffusion_model)
        check_trainable(model)
        model.model.requires_grad_(False)
        to_device(model)
        return model

    def _load(self, **wanted: Any) -> tuple[Any, ...]:
        nothing = {"output_model": False, "output_clip": False, "output_vae": False}
        try:
            found = comfy.sd.load_checkpoint_guess_config(
                str(self.file), **{**nothing, **wanted}, disable_dynamic=True
            )
        except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.file.name} cannot be loaded as a checkpoint: {reason}") from error
        return found[:3]


def to_device(model: Any) -> None:
    """All of a ModelPatcher on its device, whatever the host has moved away. Raises RuntimeError if the host
    keeps a part of it elsewhere, as with dynamic VRAM: then autograd would keep what is gone by its backward.
    """
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    if weights_streamed([model]):
        raise RuntimeError(
            "the host did not put all of the model on its device: training from the command line needs a "
            "model without dynamic VRAM, loaded in full"
        )


def free() -> None:
    """Room for the next part: nothing that was loaded stays on the GPU."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
