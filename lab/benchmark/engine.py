"""A ComfyUI that makes a method's edits, one at a time, through its own HTTP API.

The runner never executes a graph itself: even on one machine it starts a ComfyUI, a process of its own with
this pack and no other, and asks that. So what is judged is what a user's ComfyUI makes.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..server import Client, NodeError, Server, ServerError, device_arguments
from .cases import Case, CaseError
from .methods import OUTPUT, PICTURE_SLOTS, Method

FOLDER = "descriptive-edit-benchmark"
ATTEMPTS = 2


class EngineGone(ServerError):
    """The engine's ComfyUI is not there and cannot be started."""


@dataclass(frozen=True)
class Outcome:
    """An edit's picture, or why there is none. seconds: of the prompt, with loading what it needs."""

    picture: Image.Image | None
    seconds: float
    error: str = ""


class Engine:
    """One ComfyUI. start: gives a client of it; called again when the ComfyUI has died."""

    def __init__(self, name: str, start: Callable[[], Client], methods: Sequence[Method]) -> None:
        self.name = name
        self._start, self._methods = start, methods
        self._client: Client | None = None
        self._retired = False

    def connect(self) -> Client:
        """The running ComfyUI. Raises EngineGone if there is none, or none with the methods' nodes."""
        if self._client is not None:
            return self._client
        if self._retired:
            raise EngineGone(f"{self.name} was stopped")
        try:
            client = self._start()
            there = client.object_info()
        except (ServerError, OSError) as error:
            raise EngineGone(f"{self.name} does not answer: {error}") from error
        self._client = client
        for method in self._methods:
            lacking = sorted({node["class_type"] for node in method.prompt.values()} - set(there))
            if lacking:
                self.close()
                raise EngineGone(f"{self.name} has no {', '.join(lacking)}, which {method.label} needs")
        return client

    def close(self, retire: bool = False) -> None:
        """Stop the ComfyUI if it is ours. retire: never start it again."""
        self._retired |= retire
        client, self._client = self._client, None
        if isinstance(client, Server):
            client.stop()

    def attempt(self, method: Method, case: Case) -> Outcome:
        """The method's edit of a case, tried again if the ComfyUI dies. Raises EngineGone."""
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


def _edit(client: Client, method: Method, case: Case) -> Image.Image:
    source = case.read("source_image")
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


def own_engines(comfyui: Path, count: int, methods: Sequence[Method]) -> list[Engine]:
    """Engines that start a ComfyUI each, with its own models and this pack, on the GPUs in turn."""
    gpus = torch.cuda.device_count()
    common = ["--models-directory", str(comfyui / "models"), *device_arguments()]

    def engine(number: int) -> Engine:
        device = ["--cuda-device", str(number % gpus)] if gpus > 1 else []
        return Engine(f"ComfyUI {number + 1}", lambda: Server(comfyui, [*common, *device]), methods)

    return [engine(number) for number in range(count)]


def running_engines(addresses: Sequence[str], methods: Sequence[Method]) -> list[Engine]:
    """Engines that are running ComfyUIs, with whatever node packs they have."""

    def engine(address: str) -> Engine:
        return Engine(address, lambda: Client(address), methods)

    return [engine(address) for address in addresses]
