"""Tells by content whether two MODELs are the same network with the same weights and LoRAs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import BypassInjectionManager

# Layers at both ends of a UNet, and of a DiT: every finetune changes them, and they are small.
_SAMPLED_LAYERS = (
    *("diffusion_model.input_blocks.0.", "diffusion_model.out."),
    *("diffusion_model.img_in", "diffusion_model.final_layer.", "diffusion_model.nerf_final_layer"),
)
# Of a larger tensor as many values are read, spread evenly: a merge's patches are whole models.
_VALUES = 65536
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ModelIdentity:
    """Enough of a MODEL to tell whether two are the same network with the same weights and LoRAs."""

    family: str
    prediction: str
    weights: str
    patches: str

    @classmethod
    def of(cls, model: ModelPatcher) -> ModelIdentity:
        """Read a model's identity.

        Weights are hashed without patches, so it does not matter what is loaded. Patches are hashed by
        content, so loading the same LoRA again does not matter. Both are read in the model's dtype: with
        dynamic VRAM weights keep their file's dtype until they are used.
        """
        weights = _Digest(model.model_dtype())
        for prefix in _SAMPLED_LAYERS:
            for key, entries in model.get_key_patches(prefix).items():
                weights.add(key, entries[0][0].detach())
        sampling: Any = model.get_model_object("model_sampling")
        bases = "/".join(base.__name__ for base in type(sampling).__bases__)
        return cls(
            family=type(model.model.model_config).__name__,
            prediction=f"{bases} {float(sampling.sigma_min):.4g}-{float(sampling.sigma_max):.4g}",
            weights=weights.text(),
            patches=_patches(model),
        )

    def difference(self, other: ModelIdentity) -> str | None:
        """How `other` differs, for an error message; None if they are the same."""
        if self.family != other.family:
            return f"a {other.family} model, not {self.family}"
        if self.prediction != other.prediction:
            return f"other model sampling ({other.prediction}, not {self.prediction})"
        if self.weights != other.weights:
            return "a checkpoint with other weights"
        if self.patches != other.patches:
            return "other LoRAs or weight patches"
        return None


def _patches(model: ModelPatcher) -> str:
    """A digest of a model's weight patches and injections; LoRAs in bypass mode are among the injections."""
    if not model.patches and not model.injections:
        return "none"
    digest = _Digest(model.model_dtype())
    for key in sorted(model.patches):
        digest.add(key, model.patches[key])
    for key, injections in sorted(model.injections.items()):
        digest.add(key, [injection.inject for injection in injections])
        for injection in injections:
            for cell in getattr(injection.inject, "__closure__", None) or ():
                if isinstance(cell.cell_contents, BypassInjectionManager):
                    digest.add(_bypassed(model, cell.cell_contents))
    return digest.text()


def _bypassed(model: ModelPatcher, manager: BypassInjectionManager) -> list[Any]:
    """The LoRAs of a bypass, in the dtype of their layers, to which the host casts them on the first run."""
    found: list[Any] = []
    for key, (adapter, strength) in sorted(manager.adapters.items()):
        dtype = getattr(getattr(comfy.utils.get_attr(model.model, key), "weight", None), "dtype", None)
        values = vars(adapter).get("weights")
        if dtype in _FLOATS and isinstance(values, list | tuple):
            values = [item.to(dtype) if isinstance(item, torch.Tensor) else item for item in values]
        found.append((key, type(adapter), values, strength))
    return found


class _Digest:
    """A hash of nested values: tensors, plain values, containers of them, and the names of functions.

    dtype: to read tensors in, unless it is too coarse to tell a LoRA's values apart.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._hash = hashlib.sha256()
        self._dtype = dtype if dtype in _FLOATS else torch.float32

    def text(self) -> str:
        return self._hash.hexdigest()[:12]

    def add(self, *values: Any) -> None:
        """Add `values`, which may be nested, to the hash."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self._add_tensor(value)
            elif isinstance(value, dict):
                self._note("dict", len(value))
                self.add(*(part for item in value.items() for part in item))
            elif isinstance(value, list | tuple):
                self._note("list", len(value))
                self.add(*value)
            elif isinstance(value, bool | int | float | str | bytes | None):
                self._note(type(value).__name__, repr(value))
            elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
                self._note(value.__module__, value.__qualname__)
            elif hasattr(value, "weights"):  # the host's weight adapters
                self.add(type(value), value.weights)
            else:
                self.add(type(value))

    def _note(self, *parts: Any) -> None:
        self._hash.update("\0".join(map(str, (*parts, ""))).encode())

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        self._note(tuple(tensor.shape))
        flat = tensor.detach().reshape(-1)
        if flat.numel() > _VALUES:
            flat = flat[:: flat.numel() // _VALUES]
        self._hash.update(flat.to(device="cpu", dtype=self._dtype).float().contiguous().numpy().tobytes())
