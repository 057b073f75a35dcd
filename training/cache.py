"""Pairs encoded once, on disk: training never needs the VAE and the text encoder beside the UNet.

A pair's file is named after its content, the pixels, both texts and the encoders' weights, so a changed pair
is encoded again and nothing else is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .objective import Batch
from .pairs import EditPair

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EncodedPairs:
    """EDIT_PAIRS: files of latents (as the VAE gives them) and texts, and each pair's latent size."""

    folder: Path
    names: tuple[str, ...]
    files: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    shared: tuple[tuple[tuple[int, int], str], ...]

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, numbers: Sequence[int], device: torch.device, process_latent_in: Callable) -> Batch:
        """Pairs of one size, with latents in the model's own space."""
        rows = [self._read(self.files[number]) for number in numbers]
        shared = self._read(dict(self.shared)[self.sizes[numbers[0]]])
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]} | shared
        moved = {name: value.to(device, torch.float32) for name, value in joined.items()}
        for name in ("source", "edit", "white"):
            moved[name] = process_latent_in(moved[name])
        return Batch(**moved)

    def _read(self, name: str) -> Tensors:
        try:
            return safetensors.torch.load_file(self.folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"the encoded pair {name} cannot be read ({error}): run the node that encodes the pairs again"
            ) from None


def encode_pairs(
    pairs: Iterable[EditPair], vae: Any, clip: Any, folder: Path, report: Callable[[int], None] | None = None
) -> EncodedPairs:
    """Encode what is not in `folder` yet. `report` is told after each pair how many are done."""
    folder.mkdir(parents=True, exist_ok=True)
    encoders = _fingerprint(vae.first_stage_model), _fingerprint(clip.cond_stage_model)
    names, files, sizes, shared = [], [], [], {}
    for done, pair in enumerate(pairs, 1):
        pixels = tuple(pair.source.shape[:2])
        key = _digest(*encoders, pair.source, pair.edit, pair.source_text, pair.edit_text)
        found = _stored(folder, key, partial(_encode_pair, pair, vae, clip))
        size = tuple(found["source"].shape[-2:])
        if size not in shared:
            key_of_size = _digest(*encoders, "shared", str(pixels))
            shared[size] = f"{key_of_size}.safetensors"
            _stored(folder, key_of_size, partial(_encode_shared, pixels, vae, clip))
        names.append(pair.name)
        files.append(f"{key}.safetensors")
        sizes.append(size)
        if report is not None:
            report(done)
    return EncodedPairs(folder, tuple(names), tuple(files), tuple(sizes), tuple(shared.items()))


def _encode_pair(pair: EditPair, vae: Any, clip: Any) -> Tensors:
    return {
        "source": vae.encode(pair.source[None]),
        "edit": vae.encode(pair.edit[None]),
        "source_text": _text(clip, pair.source_text),
        "edit_text": _text(clip, pair.edit_text),
    }


def _encode_shared(pixels: tuple[int, int], vae: Any, clip: Any) -> Tensors:
    return {"empty_text": _text(clip, ""), "white": vae.encode(torch.ones(1, *pixels, 3))}


def _text(clip: Any, text: str) -> torch.Tensor:
    """The first 77 tokens, as in the paper: longer descriptions are cut."""
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=False)[:, :77]


def _stored(folder: Path, key: str, make: Callable[[], Tensors]) -> Tensors:
    path = folder / f"{key}.safetensors"
    if path.exists():
        return safetensors.torch.load_file(path)
    tensors = {name: value.float().contiguous().cpu() for name, value in make().items()}
    part = path.with_suffix(".part")
    try:
        safetensors.torch.save_file(tensors, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return tensors


def _fingerprint(module: torch.nn.Module) -> str:
    """Of a network's weights: all the small ones, which every finetune changes."""
    small = (weight for weight in module.state_dict().values() if weight.numel() <= 4096)
    return _digest(*(weight.float().cpu() for weight in small))


def _digest(*parts: torch.Tensor | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.contiguous().numpy().tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
