"""A ComfyUI that runs workflows on cases, one at a time, through its HTTP API.

Even on one machine it is a separate process, with this pack and no other, so the results are those of a
user's ComfyUI.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from ..server import Client, NodeError, Server, ServerError, device_arguments
from .cases import Case, CaseError
from .methods import OUTPUT, PICTURE_SLOTS, Workflow

FOLDER = "descriptive-edit-benchmark"
ATTEMPTS = 2


class WorkerGone(ServerError):
    """The ComfyUI of a worker does not run and cannot be started."""


@dataclass(frozen=True)
class Outcome:
    """The image of an edit, or the error.

    seconds: of the prompt, including the time to load models.
    """

    picture: Image.Image | None
    seconds: float
    error: str = ""


class ComfyWorker:
    """One ComfyUI.

    start: returns a client of it; called again after the ComfyUI has died.
    """

    def __init__(self, name: str, start: Callable[[], Client], methods: Sequence[Workflow]) -> None:
        self.name = name
        self._start, self._methods = start, methods
        self._client: Client | None = None
        self._retired = False

    def connect(self) -> Client:
        """The running ComfyUI. Raises WorkerGone if there is none, or if it lacks nodes of the methods."""
        if self._client is not None:
            return self._client
        if self._retired:
            raise WorkerGone(f"{self.name} was stopped")
        try:
            client = self._start()
            there = client.object_info()
        except (ServerError, OSError) as error:
            raise WorkerGone(f"{self.name} does not answer: {error}") from error
        self._client = client
        for method in self._methods:
            lacking = sorted({node["class_type"] for node in method.prompt.values()} - set(there))
            if lacking:
                self.close()
                raise WorkerGone(f"{self.name} has no {', '.join(lacking)}, which {method.label} needs")
        return client

    def close(self, retire: bool = False) -> None:
        """Stop the ComfyUI if this process started it.

        retire: never start it again.
        """
        self._retired |= retire
        client, self._client = self._client, None
        if isinstance(client, Server):
            client.stop()

    def edit(self, method: Workflow, case: Case) -> Outcome:
        """Run the method on a case, and again if the ComfyUI dies. Raises WorkerGone."""
        for number in range(1, ATTEMPTS + 1):
            client = self.connect()
            start = time.monotonic()
            try:
                picture = _edit(client, method, case)
                return Outcome(picture, time.monotonic() - start)
            except (NodeError, CaseError) as error:
                return Outcome(None, time.monotonic() - start, str(error))
            except (ServerError, OSError) as error:
                self.close()
                failure = f"{self.name} failed {number} times: {error}"
        return Outcome(None, time.monotonic() - start, failure)


def _edit(client: Client, method: Workflow, case: Case) -> Image.Image:
    source = case.source()
    pictures = {"source_image": source}
    if "mask" in method.slots:
        pictures["mask"] = case.read("mask") or Image.new("L", source.size, 255)
    names = {slot: _upload(client, pictures[slot]) for slot in PICTURE_SLOTS if slot in pictures}
    outputs = client.run(method.fill(case, names))
    images = outputs.get(method.output, {}).get("images", [])
    if not images:
        raise NodeError(
            method.output, method.prompt[method.output]["class_type"], f"{OUTPUT} gave no picture"
        )
    with Image.open(io.BytesIO(client.image(images[0]))) as file:
        return file.convert("RGB")


def _upload(client: Client, picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    name = hashlib.sha256(picture.mode.encode() + picture.tobytes()).hexdigest()[:24]
    return client.upload(buffer.getvalue(), f"{name}.png", FOLDER)


def own_workers(comfyui: Path, count: int, methods: Sequence[Workflow]) -> list[ComfyWorker]:
    """Workers that each start a ComfyUI, with its own models and this pack, assigned to the GPUs in turn."""
    gpus = torch.cuda.device_count()
    common = ["--models-directory", str(comfyui / "models"), *device_arguments()]
    workers = []
    for number in range(count):
        device = ["--cuda-device", str(number % gpus)] if gpus > 1 else []
        start = partial(Server, comfyui, [*common, *device])
        workers.append(ComfyWorker(f"ComfyUI {number + 1}", start, methods))
    return workers


def running_workers(addresses: Sequence[str], methods: Sequence[Workflow]) -> list[ComfyWorker]:
    """Workers that use running ComfyUIs, with whatever node packs these have."""
    return [ComfyWorker(address, partial(Client, address), methods) for address in addresses]
