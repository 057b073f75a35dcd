"""Reads and writes attention bridges: this pack's format and the authors' release layout.

A file is recognised by its content, never by its name. Only safetensors files are read.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import safetensors
import safetensors.torch
import torch

from .bridge import AttentionBridge, BridgeSettings, manage
from .files import replacing

FORMAT, VERSIONS = "attention-bridge", ("1", "2")
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
    """Write a bridge in this pack's format, under a temporary name first.

    Version 1 is a UNet's with a full F or none, which packs before version 2 read; all others are version 2.
    """
    settings = bridge.settings
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[settings.joint or settings.fuse_rank > 0],
        "base": settings.base,
        "rank": str(settings.rank),
        "alpha": repr(float(settings.alpha)),
        "direction": settings.direction,
        "fusion": settings.fusion,
        "fuse_rank": str(settings.fuse_rank),
        "reference_self_bridge": str(settings.reference_self_bridge).lower(),
        "layers": ",".join(settings.widths),
    }
    tensors = {
        name.removesuffix(".weight"): weight.detach().contiguous().cpu()
        for name, weight in bridge.state_dict().items()
    }
    with replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata=metadata)


def load_bridge(path: Path) -> Any:
    """ATTENTION_BRIDGE from a file of this pack's format or of the authors' release layout.

    Of a release, either file may be given: the LoRA file in its `xy_lora` folder, or the `model.safetensors`
    with the `conv1n` weights beside that folder, alone or with the LoRA and the whole UNet.

    Raises ValueError, listing the tensors, if some are missing, unexpected, misshapen or not finite. Raises
    ValueError if the file is something else or cut off, or is half a release whose other half is missing or
    ambiguous.
    """
    names, metadata = _header(path)
    if metadata.get("format") == FORMAT:
        tensors = _read(path, names)
        settings = _settings(path, tensors, metadata)
    elif _lora_names(names) or _fuse_names(names):
        settings, tensors = _read_release(path, names)
    else:
        kind = "a LoRA" if any("lora" in name for name in names) else "something else"
        first = ", ".join(sorted(names)[:2]) or "no tensors"
        raise ValueError(f"{path.name} is not an attention bridge but {kind} (it holds {first}, ...)")
    tensors = {f"{name}.weight": weight for name, weight in tensors.items()}
    dtype = comfy.utils.weight_dtype(tensors)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AttentionBridge(settings).state_dict().items()}
    _check(path, tensors, shapes)
    device = comfy.model_management.unet_offload_device()
    with torch.inference_mode(False):
        bridge = AttentionBridge(settings, dtype, device)
        bridge.load_state_dict(tensors)  # copied, so that replacing the file later does not change the bridge
        return manage(bridge)


def files_of(path: Path) -> list[Path]:
    """The files that `load_bridge` reads for this one: the file itself, and for half a release the candidates
    for its other half.
    """
    names, metadata = _header(path)
    if metadata.get("format") == FORMAT or bool(_lora_names(names)) == bool(_fuse_names(names)):
        return [path]
    return [path, *_beside(path), *_in_folder(path)]


def _header(path: Path) -> tuple[list[str], Mapping[str, str]]:
    """The names of the tensors, and the metadata."""
    with _opened(path) as file:
        return list(file.keys()), file.metadata() or {}


def _read(path: Path, names: Iterable[str]) -> Tensors:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, json.JSONDecodeError, struct.error, OSError) as error:
        raise ValueError(f"{path.name} cannot be read as a safetensors file: {error}") from None


def _settings(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> BridgeSettings:
    version = metadata.get("version")
    if version not in VERSIONS:
        raise ValueError(
            f"{path.name} is an attention bridge of version {version!r}, but this pack reads "
            f"versions {' and '.join(VERSIONS)}: update the pack"
        )
    try:
        layers = metadata.get("sites") or metadata["layers"]  # `sites` in the first files
        # q.up is [width, rank]; a layer without it is found by the check of all names.
        widths = {key: len(tensors.get(f"{key}.q.up", ())) or 1 for key in layers.split(",")}
        return BridgeSettings(
            base=metadata["base"],
            widths=widths,
            rank=int(metadata["rank"]),
            alpha=float(metadata["alpha"]),
            direction=metadata["direction"],
            fusion=metadata["fusion"],
            fuse_rank=int(metadata["fuse_rank"] if version == "2" else 0),
            reference_self_bridge={"true": True, "false": False}[metadata["reference_self_bridge"]],
        )
    except (KeyError, ValueError) as error:
        reason = f"no or wrong entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path.name} is an attention bridge with damaged metadata: {reason}") from None


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


def _lora_names(names: Iterable[str]) -> list[str]:
    """The LoRA on an extra attention of the blocks; none if it is on several.

    LoRA on `attn1` or `attn2` is an ordinary LoRA.
    """
    matches = [match for name in names if (match := _RELEASE_LORA.fullmatch(name))]
    extra = [match for match in matches if match[2] not in ("attn1", "attn2")]
    return [match[0] for match in extra] if len({match[2] for match in extra}) == 1 else []


def _fuse_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if _RELEASE_FUSE.fullmatch(name)]


def _beside(path: Path) -> list[Path]:
    """Possible places of the release's `conv1n` weights."""
    folder = path.parent.parent if path.parent.name == _RELEASE_FOLDER else path.parent
    return _files_in(folder)


def _in_folder(path: Path) -> list[Path]:
    """Possible places of the release's LoRA."""
    return _files_in(path.parent if path.parent.name == _RELEASE_FOLDER else path.parent / _RELEASE_FOLDER)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".safetensors")


def _read_release(path: Path, names: Sequence[str]) -> tuple[BridgeSettings, Tensors]:
    """The authors' layout.

    Their training passes the reference's own rows through the bridge, and alpha equals the rank (arXiv
    2508.20505, released code).
    """
    lora = fuse = path
    if not _fuse_names(names):
        if path.parent.name != _RELEASE_FOLDER:
            raise _half(path, "conv1n weights (model.safetensors)")
        _only(path, _in_folder(path), _lora_names, "LoRA file")
        fuse = _only(path, _beside(path), _fuse_names, "conv1n weights (model.safetensors)")
    elif not _lora_names(names):
        _only(path, _beside(path), _fuse_names, "conv1n weights (model.safetensors)")
        lora = _only(path, _in_folder(path), _lora_names, "LoRA file")
    found = _release_tensors(path, _read(lora, _lora_names(_header(lora)[0])))
    both = _header(fuse)[0]
    found |= _release_tensors(path, _read(fuse, _fuse_names(both)))
    if fuse != lora:
        _check_same(path, fuse, found, _release_tensors(path, _read(fuse, _lora_names(both))))
    fuses = sorted((name for name in found if name.endswith(".fuse")), key=_natural)
    widths = {name.removesuffix(".fuse"): len(found[name]) for name in fuses}
    ranks = {len(weight) for name, weight in found.items() if name.endswith(".down")}
    if len(ranks) != 1:
        raise ValueError(f"{path.name}: the LoRA weights have ranks {sorted(ranks)}, not one")
    rank = ranks.pop()
    settings = BridgeSettings(
        "SD15", widths, rank, float(rank), direction="edit_queries", fuse_rank=0, reference_self_bridge=True
    )
    return settings, found


def _release_tensors(path: Path, tensors: Tensors) -> Tensors:
    """By this pack's names."""
    names = comfy.utils.unet_to_diffusers(_SD15_LAYOUT)
    found: Tensors = {}
    for name, weight in tensors.items():
        lora = _RELEASE_LORA.fullmatch(name)
        match = lora or _RELEASE_FUSE.fullmatch(name)
        assert match is not None
        inner = names.get(f"{match[1]}.attn1.to_q.weight")
        if inner is None:
            raise ValueError(f"{path.name}: {name} belongs to no self-attention of SD1.5")
        block, number, *_ = inner.split(".")
        depth = match[1].rpartition(".")[2]
        key = f"{block.partition('_')[0]}.{0 if block == 'middle_block' else number}.{depth}"
        part = f"{lora[3]}.{'down' if lora[4] in ('A', 'down') else 'up'}" if lora else "fuse"
        if f"{key}.{part}" in found:
            raise ValueError(f"{path.name}: {name} is there a second time: keep one LoRA in the file")
        found[f"{key}.{part}"] = weight
    return found


def _natural(name: str) -> list[str]:
    """Sort key by the numbers in a name: output.3 before output.10."""
    return [part.zfill(3) for part in name.split(".")]


def _only(path: Path, candidates: Iterable[Path], fits: Callable[[list[str]], Any], what: str) -> Path:
    """The only file with this half; `path` is the other half."""
    found, problem = [], None
    for candidate in candidates:
        try:
            if fits(_header(candidate)[0]):
                found.append(candidate)
        except ValueError as error:
            problem = error
    if len(found) > 1:
        raise ValueError(
            f"{path.name} is one half of a DescriptiveEdit release, and its other half is ambiguous: "
            f"{' and '.join(other.name for other in found)} all have the {what}. Keep each release in its "
            "own folder"
        )
    if not found:
        raise problem or _half(path, what)
    return found[0]


def _half(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path.name} is one half of a DescriptiveEdit release; the {what} is missing: keep both as "
        f"released, model.safetensors beside the folder {_RELEASE_FOLDER}"
    )


def _check_same(path: Path, other: Path, lora: Tensors, same: Tensors) -> None:
    """Raise ValueError unless the LoRA in the release's other file, if any, is this one."""
    for name, weight in same.items():
        mine = lora.get(name)
        if mine is None or mine.shape != weight.shape or not _near(mine.float(), weight.float()):
            raise ValueError(
                f"{path.name} and {other.name} are of two releases: their LoRAs differ. Keep each release "
                "in its own folder"
            )


def _near(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal up to half-precision rounding."""
    return torch.allclose(first, second, rtol=1e-2, atol=1e-4, equal_nan=True)
