"""Loads the base model of a bridge in parts: first the encoders, then only the network."""

from __future__ import annotations

import pickle
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import safetensors
import torch
from comfy.model_patcher import ModelPatcher

from ..models.tiny_studio import studio
from ..patches.host.autograd import weights_streamed
from .cache import file_fingerprint
from .config import EncoderFiles
from .objective import check_trainable

TINY_STUDIO = "tiny_studio"
# By which names of weights a file is one of a DiT: Flux, SD3, Qwen-Image.
_DIT_BLOCKS = ("double_blocks.", "joint_blocks.", ".attn.add_q_proj.")
_PARTS = {"model": "network", "clip": "text encoder", "vae": "VAE"}


class BaseModelLoader:
    """source: a checkpoint file, or `tiny_studio`.
    encoders: files of what the checkpoint does not hold.

    Raises ValueError if a file does not exist. Its methods raise ValueError if the file lacks what they load.
    """

    def __init__(self, source: str, encoders: EncoderFiles | None = None) -> None:
        tiny = source == TINY_STUDIO
        self.file, self._encoders = studio.FILE if tiny else Path(source), encoders or EncoderFiles()
        self._load = _studio_part if tiny else partial(_checkpoint_part, self.file)
        if not self.file.is_file():
            raise ValueError(f"base is {source!r} but must be a checkpoint file, or {TINY_STUDIO}")
        for name, file in self._encoders.named():
            if not file.is_file():
                raise ValueError(f"{name} has {str(file)!r}, which is not a file")

    def fingerprint(self) -> str:
        """Names and content of the files."""
        files = [self.file, *(file for _, file in self._encoders.named())]
        return ", ".join(f"{file.name} {file_fingerprint(file)}" for file in files)

    def encoders(self) -> tuple[comfy.sd.VAE, comfy.sd.CLIP]:
        clip = self._clip()
        return self.vae(), clip

    def _clip(self) -> comfy.sd.CLIP:
        files = self._encoders
        if not files.text_encoders:
            return self._load("clip")
        kind = comfy.sd.CLIPType[files.type.upper()]
        with _reading("encoders.text_encoders"):
            return comfy.sd.load_clip(list(files.text_encoders), clip_type=kind, disable_dynamic=True)

    def vae(self) -> comfy.sd.VAE:
        if not self._encoders.vae:
            return self._load("vae")
        with _reading("encoders.vae"):
            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(self._encoders.vae, safe_load=True))
            vae.throw_exception_if_invalid()
        return vae

    def network(self, dtype: torch.dtype) -> ModelPatcher:
        """The network on the host's device, frozen.

        dtype: of a UNet's weights. A DiT's stay as the host loads its file, fp8 too.
        """
        model = self._load("model", **({} if self._is_dit() else {"dtype": dtype}))
        check_trainable(model)
        model.model.requires_grad_(False)
        to_device(model)
        return model

    def _is_dit(self) -> bool:
        try:
            with safetensors.safe_open(str(self.file), framework="pt") as file:
                names = list(file.keys())
            return any(part in name for name in names for part in _DIT_BLOCKS)
        except safetensors.SafetensorError:  # a file of another kind, which the host reads or refuses
            return False


def _studio_part(part: str, **options: Any) -> Any:
    if part == "model":
        return studio.load_model(disable_dynamic=True, **options)
    return {"clip": studio.load_clip, "vae": studio.load_vae}[part]()


def _checkpoint_part(file: Path, part: str, **options: Any) -> Any:
    wanted = {f"output_{name}": name == part for name in _PARTS}
    with _reading(file.name):
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(file), **wanted, model_options=options, disable_dynamic=True
        )
    found = {"model": model, "clip": clip, "vae": vae}[part]
    if found is None or getattr(found, "first_stage_model", found) is None:  # the host's VAE without weights
        hint = "" if part == "model" else ", or name its file under encoders"
        raise ValueError(f"{file.name} has no {_PARTS[part]}: take a whole checkpoint{hint}")
    return found


@contextmanager
def _reading(name: str) -> Generator[None]:
    try:
        yield
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be loaded as a checkpoint: {reason}") from error


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
