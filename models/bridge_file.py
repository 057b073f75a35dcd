"""Reading and writing attention bridges: this pack's format, and the authors' release layout.

A file is recognised by what is in it, never by its name, and nothing but safetensors is read.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import safetensors
import safetensors.torch
import torch

from .bridge import AttentionBridge, BridgeSettings, manage
from .sites import SiteKey

FORMAT, VERSION = "attention-bridge", "1"
Tensors = dict[str, torch.Tensor]

# diffusers names: of LoRA on any one attention of a block (`attn1n` in the release), and of the fuse Linear.
_RELEASE_LORA = re.compile(
    r"(?:unet\.)?((?:down_blocks|mid_block|up_blocks)[\w.]*?transformer_blocks\.\d+)\.(attn\w+)"
    r"\.(?:processor\.)?to_(q|k|v|out)(?:\.0)?(?:_lora)?\.(?:lora[_.])?(A|B|down|up)(?:\.\w+)?\.weight"
)
_RELEASE_FUSE = re.compile(
    r"(?:unet\.)?((?:down_blocks|mid_block|up_blocks)[\w.]*?transformer_blocks\.\d+)\.conv1n\.weight"
)
_RELEASE_FOLDER = "xy_lora"
_SD15_LAYOUT = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


def save_bridge(bridge: AttentionBridge, path: Path) -> None:
    """Write a bridge in this pack's format, beside `path` first and then into place."""
    settings = bridge.settings
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "base": settings.base,
        "rank": str(settings.rank),
        "alpha": repr(float(settings.alpha)),
        "direction": settings.direction,
        "fusion": settings.fusion,
        "reference_self_bridge": str(settings.reference_self_bridge).lower(),
        "sites": ",".join(".".join(map(str, key)) for key in settings.widths),
    }
    tensors = {
        name.removesuffix(".weight"): weight.detach().contiguous().cpu()
        for name, weight in bridge.state_dict().items()
    }
    part = path.with_name(path.name + ".part")
    try:
        safetensors.torch.save_file(tensors, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_bridge(path: Path) -> Any:
    """ATTENTION_BRIDGE from a file of this pack's format or of the authors' release layout.

    Of the release, either file may be given: the LoRA file in its `xy_lora` folder, or the
    `model.safetensors` with the `conv1n` weights beside that folder. Raises ValueError if the file is
    something else, is cut off, or has missing, unexpected, misshapen or non-finite tensors, which are listed.
    """
    tensors, metadata = _read(path)
    if metadata.get("format") == FORMAT:
        settings = _settings(path, tensors, metadata)
    elif any(map(_RELEASE_FUSE.fullmatch, tensors)) or _is_release_lora(tensors):
        settings, tensors = _read_release(path, tensors)
    else:
        kind = "a LoRA" if any("lora" in name for name in tensors) else "something else"
        first = ", ".join(sorted(tensors)[:2]) or "no tensors"
        raise ValueError(f"{path.name} is not an attention bridge but {kind} (it holds {first}, ...)")
    tensors = {f"{name}.weight": weight for name, weight in tensors.items()}
    dtype = comfy.utils.weight_dtype(tensors)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AttentionBridge(settings).state_dict().items()}
    _check(path, tensors, shapes)
    device = comfy.model_management.unet_offload_device()
    with torch.inference_mode(False):
        bridge = AttentionBridge(settings, dtype, device)
        bridge.load_state_dict(tensors)  # copied: whoever replaces the file later must not change the bridge
        return manage(bridge)


def _read(path: Path) -> tuple[Tensors, Mapping[str, str]]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, struct.error, OSError) as error:
        raise ValueError(f"{path.name} cannot be read as a safetensors file: {error}") from None


def _settings(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> BridgeSettings:
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path.name} is an attention bridge of version {metadata.get('version')!r}, but this pack reads "
            f"version {VERSION}: update the pack"
        )
    try:
        keys = [_key(name) for name in metadata["sites"].split(",")]
        # q.up is [width, rank]; a site without it is found by the check of all names.
        widths = {key: len(tensors.get(_tensor(key, "q.up"), ())) or 1 for key in keys}
        return BridgeSettings(
            base=metadata["base"],
            widths=widths,
            rank=int(metadata["rank"]),
            alpha=float(metadata["alpha"]),
            direction=metadata["direction"],
            fusion=metadata["fusion"],
            reference_self_bridge={"true": True, "false": False}[metadata["reference_self_bridge"]],
        )
    except (KeyError, ValueError) as error:
        reason = f"no or wrong entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path.name} is an attention bridge with damaged metadata: {reason}") from None


def _key(name: str) -> SiteKey:
    block, number, depth = name.split(".")
    return block, int(number), int(depth)


def _tensor(key: SiteKey, part: str) -> str:
    return ".".join((*map(str, key), part))


def _check(path: Path, tensors: Tensors, shapes: Mapping[str, torch.Size]) -> None:
    problems = [
        _listed("missing", shapes.keys() - tensors.keys()),
        _listed("unexpected", tensors.keys() - shapes.keys()),
        _listed(
            "misshapen",
            [
                f"{name.removesuffix('.weight')} {list(tensors[name].shape)} instead of {list(shape)}"
                for name, shape in shapes.items()
                if name in tensors and tensors[name].shape != shape
            ],
        ),
        _listed("not finite", [name for name, weight in tensors.items() if not weight.isfinite().all()]),
    ]
    if any(problems):
        raise ValueError(f"{path.name} is not a whole attention bridge: " + "; ".join(filter(None, problems)))


def _listed(problem: str, names: Iterable[str]) -> str:
    found = sorted(name.removesuffix(".weight") for name in names)
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return f"{problem}: {', '.join(found[:6])}{more}" if found else ""


def _is_release_lora(tensors: Tensors) -> bool:
    """Whether it is LoRA on an extra attention of the blocks; LoRA on `attn1` or `attn2` is a plain LoRA."""
    attentions = {match[2] for name in tensors if (match := _RELEASE_LORA.fullmatch(name))}
    return len(attentions) == 1 and not attentions & {"attn1", "attn2"}


def _read_release(path: Path, tensors: Tensors) -> tuple[BridgeSettings, Tensors]:
    """The authors' layout. Their training sends the reference's own rows through the bridge, and alpha is
    the rank (arXiv 2508.20505, released code).
    """
    if _is_release_lora(tensors):
        lora, fuse = tensors, _partner(path, path.parent.parent.glob("*.safetensors"), _RELEASE_FUSE)
    else:
        fuse, lora = tensors, _partner(path, (path.parent / _RELEASE_FOLDER).glob("*"), _RELEASE_LORA)
    names = comfy.utils.unet_to_diffusers(_SD15_LAYOUT)
    found: Tensors = {}
    for source, pattern in ((lora, _RELEASE_LORA), (fuse, _RELEASE_FUSE)):
        for name, weight in source.items():
            if match := pattern.fullmatch(name):
                inner = names.get(f"{match[1]}.attn1.to_q.weight")
                if inner is None:
                    raise ValueError(f"{path.name}: {name} belongs to no self-attention of SD1.5")
                block, number, *_ = inner.split(".")
                depth = match[1].rpartition(".")[2]
                key = (block.partition("_")[0], 0 if block == "middle_block" else int(number), int(depth))
                part = "fuse"
                if pattern is _RELEASE_LORA:
                    part = f"{match[3]}.{'down' if match[4] in ('A', 'down') else 'up'}"
                found[_tensor(key, part)] = weight
    keys = sorted({_key(name.rpartition(".fuse")[0]) for name in found if name.endswith(".fuse")})
    widths = {key: len(found[_tensor(key, "fuse")]) for key in keys}
    ranks = {len(weight) for name, weight in found.items() if name.endswith(".down")}
    if len(ranks) != 1:
        raise ValueError(f"{path.name}: the LoRA weights have ranks {sorted(ranks)}, not one")
    rank = ranks.pop()
    settings = BridgeSettings(
        "SD15", widths, rank, float(rank), direction="edit_queries", reference_self_bridge=True
    )
    return settings, found


def _partner(path: Path, candidates: Iterable[Path], pattern: re.Pattern[str]) -> Tensors:
    """The release's other file."""
    for candidate in sorted(candidates):
        if candidate.suffix == ".safetensors" and candidate != path:
            tensors, _ = _read(candidate)
            if any(map(pattern.fullmatch, tensors)):
                return tensors
    what = "conv1n weights (model.safetensors)" if pattern is _RELEASE_FUSE else "LoRA file"
    raise ValueError(
        f"{path.name} is one half of a DescriptiveEdit release; the {what} is missing: keep both as "
        f"released, model.safetensors beside the folder {_RELEASE_FOLDER}"
    )
