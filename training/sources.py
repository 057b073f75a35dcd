"""Sources of edit pairs: a folder, WebDataset tar files, or whatever the library `datasets` reads.

All give the same pairs for the same images and texts, count bad samples the same way, and can be split among
processes. Images are read by Pillow and texts as UTF-8 or JSON; nothing in the data is executed.

Tar files are read here and not by `datasets`: there one text that is not JSON stops the run, a damaged header
ends a file without a word, and one damaged file stops all others.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .libraries import library
from .pairs import BAD_SHARE, BadPair, Parts, Picture, Reading, Sample, decoded_text, folder_samples
from .settings import ROLES, DataConfig

SHARD_MEMBERS = {
    "source_image": "source.png;source.jpg;source.jpeg;source.webp",
    "edit_image": "edit.png;edit.jpg;edit.jpeg;edit.webp",
    "source_text": "json:source",
    "edit_text": "json:edit",
}
TAR_BLOCK = 512


def read_pairs(data: DataConfig, shard: tuple[int, int] = (0, 1)) -> Reading:
    """The usable pairs of a shard: of the samples rank, rank + world, rank + 2 world, ...

    Every process passes over all samples, but decodes its own images only.

    shard: (rank, world).

    Raises ValueError for data that is not there, and ImportError, with the command that installs it, if a
    library is missing. Iterating raises ValueError when more than 1% of the samples cannot be used (see
    `pairs.Reading`) or more than 1% of the tar files are damaged. A damaged tar file is logged and read up to
    the damage: with fewer than a hundred files the first one stops.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard is {rank} of {world} but must be 0 to {world - 1}")
    total = None
    match data.kind:
        case "folder":
            samples: Iterable[Sample] = folder_samples(_folder(data))
        case "webdataset":
            samples = _tar_samples(_files(data.path), {**SHARD_MEMBERS, **data.columns})
        case _:
            samples, total = _row_samples(data)
    if isinstance(samples, list):
        total = len(samples)
    if data.limit:
        samples = itertools.islice(samples, data.limit)
        total = min(total, data.limit) if total else None
    return Reading(data.name, samples, data.resolution, data.step, total, shard)


def local_files(data: DataConfig) -> list[Path]:
    """The files on this machine that the pairs come from; empty for a data set of the hub."""
    if data.kind == "folder":
        return sorted(path for path in _folder(data).iterdir() if path.is_file())
    if data.kind == "webdataset" or _is_parquet(data.path):
        return _files(data.path)
    return sorted(path for path in Path(str(data.path)).rglob("*") if path.is_file())


def _folder(data: DataConfig) -> Path:
    folder = Path(str(data.path))
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return folder


def _files(path: str | Sequence[str]) -> list[Path]:
    """The files that patterns name, in their order. Raises ValueError for a pattern that names none."""
    expand = library("braceexpand").braceexpand
    found: list[Path] = []
    missing = []
    for pattern in [path] if isinstance(path, str) else path:
        for name in expand(pattern, escape=False):
            files = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
            found += map(Path, files)
            if not files:
                missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"there is no file {missing[0]}{more}")
    return found


def _tar_samples(shards: Sequence[Path], members: Mapping[str, str]) -> Iterator[Sample]:
    group = library("webdataset.tariterators").group_by_keys
    damaged = 0
    for shard in shards:
        last = "its beginning"
        try:
            with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for found in group(_members(tar)):
                    name = found["__key__"]
                    yield Sample(name, partial(_member_parts, found, members))
                    last = f"sample {name}"
        except (OSError, tarfile.TarError, ValueError) as error:
            damaged += 1
            reason = error.args[0] if isinstance(error, ValueError) else error
            problem = f"the shard {shard} is damaged after {last} ({reason})"
            if damaged > BAD_SHARE * len(shards):
                raise ValueError(
                    f"{problem}: {damaged} of {len(shards)} shards are, more than 1%. Replace it"
                ) from None
            logging.warning("%s: the rest of it is left out", problem)


def _members(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The files in an uncompressed tar, unread, as the library's grouping expects them.

    Raises tarfile.ReadError if the archive does not end as one: tarfile, and webdataset's reader with it,
    takes a damaged header for the end.
    """
    end = 0
    for member in tar:
        end = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
        if member.isreg():
            yield {"fname": member.name, "data": partial(tar.extractfile, member), "__url__": tar.name}
    tar.fileobj.seek(end)
    if tar.fileobj.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise tarfile.ReadError("it does not end as a tar file does")


def _member_parts(found: Mapping[str, Any], members: Mapping[str, str]) -> Parts:
    pictures, texts = [], []
    for role in ROLES[:2]:
        name, extract = _member(found, members[role])
        pictures.append(Picture(name, lambda extract=extract: Image.open(extract())))
    for role in ROLES[2:]:
        extensions, _, key = members[role].partition(":")
        name, extract = _member(found, extensions)
        try:
            text = decoded_text(extract().read())
            texts.append(json.loads(text)[key] if key else text.strip())
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise BadPair(f"{name} has no {role} ({error})") from None
    return Parts(*pictures, *texts)


def _member(found: Mapping[str, Any], extensions: str) -> tuple[str, Callable[[], Any]]:
    for extension in extensions.lower().split(";"):  # the library's grouping makes them lower-case
        if extension in found:
            return f"{found['__key__']}.{extension}", found[extension]
    raise BadPair(f"there is no {found['__key__']}.{extensions.split(';')[0]}")


def _is_parquet(path: str | Sequence[str]) -> bool:
    return not isinstance(path, str) or path.endswith(".parquet")


def _row_samples(data: DataConfig) -> tuple[Iterable[Sample], int | None]:
    datasets = library("datasets")
    columns = {role: data.columns.get(role, role) for role in ROLES}
    if _is_parquet(data.path):
        where = {"path": "parquet", "data_files": {data.split: [str(file) for file in _files(data.path)]}}
    else:
        where = {"path": data.path, "revision": data.revision or None}
    try:
        rows = datasets.load_dataset(**where, split=data.split, streaming=data.streaming)
        there = rows.column_names or []
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"the data set {data.name} cannot be opened ({error})") from None
    missing = sorted(set(columns.values()) - set(there))
    if missing:
        raise ValueError(
            f"the data set {data.name} has no column {', '.join(missing)} but {', '.join(there)}: say in "
            "`columns` where the roles are"
        )
    rows = rows.select_columns(list(dict.fromkeys(columns.values())))
    for role in ROLES[:2]:
        rows = rows.cast_column(columns[role], datasets.Image(decode=False))
    decode = datasets.Image().decode_example

    def parts(row: Mapping[str, Any]) -> Parts:
        pictures = (Picture(columns[role], partial(decode, row[columns[role]])) for role in ROLES[:2])
        return Parts(*pictures, *(row[columns[role]] for role in ROLES[2:]))

    def samples() -> Iterator[Sample]:
        number = 0
        try:
            for number, row in enumerate(rows):
                yield Sample(f"row {number}", partial(parts, row))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"the data set {data.name} cannot be read after row {number} ({error})"
            ) from None

    return samples(), None if data.streaming else len(rows)
