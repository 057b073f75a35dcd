"""Caches encoded pairs on disk, so that training never needs the VAE and the text encoder beside the UNet.

Each image and each text has a file of its own, named after its content and its encoder's weights. So only
what changes is encoded again, and a caption that many pairs share is encoded once. Files hold fp16, which
rounds a value by at most 1/2048 of it.

An index lists a data set's files in order. A run that finds it reads neither the data nor an encoder. Each
process of a run encodes its shard and writes the shard's index; together they are the whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..models.files import write_bytes
from .objective import Batch
from .pairs import EditPair, Size, too_many_bad
from .settings import DataConfig
from .sources import local_files, read_pairs
from .texts import Text

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Tensors = dict[str, torch.Tensor]
_VALUE, _POOLED = "value", "pooled"  # in a file: a latent or a text's tokens, and its pooled text
_LAYOUT = "with pooled text"  # of files and indexes; those of another one are not used


@dataclass(frozen=True)
class EncodedPairs:
    """EDIT_PAIRS: the encoded pairs' files and latent sizes.

    files: source, edit, source text and edit text of each pair.
    sizes: (height, width) of each pair's latents.
    whites: by latent size, the file of a white image's latent.
    empty_text: the file of the empty text.
    """

    folder: Path
    files: tuple[tuple[str, str, str, str], ...]
    sizes: tuple[Size, ...]
    whites: tuple[tuple[Size, str], ...]
    empty_text: str

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, numbers: Sequence[int], device: torch.device, process_latent_in: Callable) -> Batch:
        """Pairs of one size, with latents in the model's own space."""
        sources, edits, *texts = zip(*(self.files[number] for number in numbers), strict=True)
        white = dict(self.whites)[self.sizes[numbers[0]]]
        source, edit, white = (
            process_latent_in(torch.cat([self._read(file)[_VALUE] for file in files]).to(device))
            for files in (sources, edits, (white,))
        )
        source_text, edit_text, (empty_text,) = (
            [self._text(file, device) for file in files] for files in (*texts, (self.empty_text,))
        )
        return Batch(source, edit, source_text, edit_text, empty_text, white)

    def _text(self, name: str, device: torch.device) -> Text:
        found = self._read(name)
        pooled = found.get(_POOLED)
        return Text(found[_VALUE].to(device), None if pooled is None else pooled.to(device))

    def _read(self, name: str) -> Tensors:
        try:
            return _load(self.folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"the encoded pair's file {name} cannot be read ({error}): delete the index files "
                f"(index-*.json) in {self.folder}, if there are any, and encode the pairs again"
            ) from None


@torch.inference_mode()
def encode_pairs(
    pairs: Iterable[EditPair], vae: Any, clip: Any, folder: Path, report: Callable[[int], None] | None = None
) -> EncodedPairs:
    """Encode what is not in `folder` yet.

    report: called after each pair with the number of pairs done.

    Raises OSError, naming the folder, if its disk is full: what was encoded until then stays. Raises
    ValueError, naming the pair, for an image or text that is encoded to numbers that are not finite.
    """
    vae_mark, clip_mark = _fingerprint(vae.first_stage_model), _fingerprint(clip.cond_stage_model)

    def latent(what: str, picture: torch.Tensor) -> tuple[str, Size]:
        name = _name("latent", vae_mark, picture)
        stored = _stored(folder, name, what, lambda: {_VALUE: vae.encode(picture[None])})
        height, width = stored[_VALUE].shape[-2:]
        return name, (height, width)

    def embedding(what: str, text: str) -> str:
        name = _name(f"text {_LAYOUT}", clip_mark, text)
        _stored(folder, name, what, partial(_text, clip, text))
        return name

    files, sizes, whites = [], [], {}
    empty_text = embedding("empty text", "")
    for done, pair in enumerate(pairs, 1):
        source, size = latent(f"source of {pair.name}", pair.source)
        edit, _ = latent(f"edit of {pair.name}", pair.edit)
        source_text = embedding(f"source text of {pair.name}", pair.source_text)
        edit_text = embedding(f"edit text of {pair.name}", pair.edit_text)
        if size not in whites:
            whites[size], _ = latent("white picture", torch.ones_like(pair.source))
        files.append((source, edit, source_text, edit_text))
        sizes.append(size)
        if report is not None:
            report(done)
    return EncodedPairs(folder, tuple(files), tuple(sizes), tuple(sorted(whites.items())), empty_text)


def encode_shard(
    data: DataConfig,
    encoders: str,
    load: Callable[[], tuple[Any, Any]],
    folder: Path,
    shard: tuple[int, int] = (0, 1),
    report: Callable[[int], None] | None = None,
) -> None:
    """Encode a shard of the data's pairs into `folder`, and write its index.

    Where the index is there already, or that of all pairs, nothing is read and `load` is not called.

    encoders: identifies VAE and text encoder, such as by `file_fingerprint` of their checkpoint.
    load: returns the VAE and the CLIP.
    shard: (rank, world).
    report: as of `encode_pairs`.

    Raises what `read_pairs` and `encode_pairs` raise.
    """
    rank, world = shard
    path = folder / f"index-{_index_digest(data, encoders)}-{rank}-of-{world}.json"
    if path.exists() or indexed_pairs(data, encoders, folder) is not None:
        return
    reading = read_pairs(data, shard)
    pairs = encode_pairs(reading, *load(), folder, report)
    index = {
        "samples": reading.seen,
        "bad": reading.bad,
        "pairs": list(zip(reading.numbers, pairs.files, pairs.sizes, strict=True)),
        "whites": pairs.whites,
        "empty_text": pairs.empty_text,
    }
    _write(path, json.dumps(index).encode())


def indexed_pairs(data: DataConfig, encoders: str, folder: Path) -> EncodedPairs | None:
    """The encoded pairs, from the indexes of all shards; None if one is missing or the data has changed.

    However many shards there were, the pairs are in the order of the samples, without the bad ones. Data of
    the hub without a `revision` counts as unchanged.

    Raises ValueError if too many samples are bad (`pairs.too_many_bad`).
    """
    digest = _index_digest(data, encoders)
    for first in sorted(folder.glob(f"index-{digest}-0-of-*.json")):
        world = int(first.stem.rpartition("-")[2])
        paths = [folder / f"index-{digest}-{rank}-of-{world}.json" for rank in range(world)]
        if not all(path.exists() for path in paths):
            continue
        indexes = [json.loads(path.read_bytes()) for path in paths]
        bad = [(number, problem) for index in indexes for number, problem in index["bad"]]
        too_many_bad(data.name, bad, indexes[0]["samples"])
        rows = sorted(row for index in indexes for row in index["pairs"])
        whites = {tuple(size): name for index in indexes for size, name in index["whites"]}
        files = tuple(tuple(files) for _, files, _ in rows)
        sizes = tuple((height, width) for _, _, (height, width) in rows)
        return EncodedPairs(folder, files, sizes, tuple(sorted(whites.items())), indexes[0]["empty_text"])
    return None


def file_fingerprint(path: Path) -> str:
    """Fingerprint of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:32]


def _index_digest(data: DataConfig, encoders: str) -> str:
    """Digest of everything that determines the pairs, such as the data's files by name, size and time of
    change.
    """
    stats = ((file.name, file.stat()) for file in local_files(data))
    files = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return _digest(_LAYOUT, json.dumps(asdict(data), sort_keys=True), encoders, *files)


def _text(clip: Any, text: str) -> Tensors:
    embedding, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return {_VALUE: embedding} if pooled is None else {_VALUE: embedding, _POOLED: pooled}


def _name(kind: str, encoder: str, content: torch.Tensor | str) -> str:
    """In folders of their first two digits: file systems are slow with millions of files in one."""
    shape = str(tuple(content.shape)) if isinstance(content, torch.Tensor) else ""
    key = _digest(kind, encoder, shape, content)
    return f"{key[:2]}/{key}.safetensors"


def _load(path: Path) -> Tensors:
    return {name: value.float() for name, value in safetensors.torch.load_file(path).items()}


def _stored(folder: Path, name: str, what: str, make: Callable[[], Tensors]) -> Tensors:
    path = folder / name
    with contextlib.suppress(
        FileNotFoundError, safetensors.SafetensorError
    ):  # a damaged file is written again
        return _load(path)
    values = {part: value.to("cpu", torch.float16).contiguous() for part, value in make().items()}
    if not all(value.isfinite().all() for value in values.values()):
        raise ValueError(f"the encoded {what} has values that are not finite: run the encoder in fp32")
    _write(path, safetensors.torch.save(values))
    return {part: value.float() for part, value in values.items()}


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(
            error.errno,
            "the disk is full: what is encoded is kept, so make room and start again",
            str(path.parent),
        ) from None


def _fingerprint(module: torch.nn.Module) -> str:
    """Fingerprint of a network's weights: of all the small ones, which every finetune changes."""
    small = (weight for weight in module.state_dict().values() if weight.numel() <= 4096)
    return _digest(*(weight.float().cpu() for weight in small))


def _digest(*parts: torch.Tensor | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.contiguous().numpy().tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
