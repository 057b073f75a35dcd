"""A real ComfyUI with the pack as a child process, and the parts of its API that tests and reports use.

Run as a module it is `python dev.py serve`. It needs ComfyUI's packages and no other file of the pack.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".comfyui"
PACK_FOLDER = "ComfyUI-DescriptiveEdit"
GUARD = Path(__file__).with_name("guarded.py")

Prompt = dict[str, dict[str, Any]]
Progress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """The server did not start, stopped, or did not answer in time."""


class NodeError(RuntimeError):
    """A node refused its inputs or failed while it ran."""

    def __init__(self, node_id: str, node_type: str, message: str) -> None:
        super().__init__(f"{node_type} (node {node_id}): {message}")
        self.node_id = node_id
        self.node_type = node_type
        self.message = message


def make_base(base: Path) -> Path:
    """Create a base directory for ComfyUI: user, input and output folders, and a link to the pack."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_FOLDER
    if link.exists() and link.resolve() == ROOT:
        return base
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        # On Windows most users may not create symbolic links, but all may create junctions.
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))
    return base


def temporary_base() -> Path:
    """A new base directory for one run; the caller removes it."""
    runs = STATE / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    return make_base(Path(tempfile.mkdtemp(prefix="run-", dir=runs)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_arguments() -> list[str]:
    """`--cpu` if torch finds no accelerator: otherwise ComfyUI does not start."""
    import torch

    found = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return [] if found else ["--cpu"]


def server_command(comfyui: Path, base: Path, port: int, arguments: list[str]) -> list[str]:
    database = (base / "user" / "comfyui.db").as_posix()
    return [
        *(sys.executable, str(comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port)),
        *("--base-directory", str(base), "--database-url", f"sqlite:///{database}", "--disable-auto-launch"),
        *arguments,
    ]


def environment() -> dict[str, str]:
    """This process's variables. Threads of torch that wait for others sleep: by default they spin, and on a
    machine with other work that takes the cores from those they wait for, and a run takes ten times as long.
    """
    return {"OMP_WAIT_POLICY": "passive", **os.environ}


class Client:
    """A running ComfyUI, ours or another one. address: of its web page, such as http://127.0.0.1:8188."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def _last_words(self) -> str:
        return ""

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def object_info(self) -> dict[str, Any]:
        """All nodes the server knows, as the web page sees them."""
        return self.json("/object_info")

    def image(self, item: dict[str, str]) -> bytes:
        """The file of one image entry in a prompt's outputs."""
        query = {key: item[key] for key in ("filename", "subfolder", "type")}
        return self.get(f"/view?{urllib.parse.urlencode(query)}")

    def upload(self, picture: bytes, name: str, folder: str = "") -> str:
        """Upload an image where LoadImage finds it; returns the name to load it by."""

        async def send() -> dict[str, str]:
            form = aiohttp.FormData({"subfolder": folder})
            form.add_field("image", picture, filename=name)
            async with (
                aiohttp.ClientSession(self.address) as session,
                session.post("/upload/image", data=form) as answer,
            ):
                answer.raise_for_status()
                return await answer.json()

        try:
            stored = asyncio.run(send())
        except aiohttp.ClientError as error:
            raise ServerError(f"the server did not take {name}: {error}{self._last_words()}") from error
        return "/".join(filter(None, (stored["subfolder"], stored["name"])))

    def run(self, prompt: Prompt, progress: Progress | None = None, timeout: float = 1800) -> dict[str, Any]:
        """Queue a prompt, follow it on the websocket, return its outputs by node; NodeError if a node fails.

        `progress` is called with a node's type, its step and its number of steps (0, 0 when it starts).
        """
        try:
            prompt_id = asyncio.run(asyncio.wait_for(self._follow(prompt, progress), timeout))
        except asyncio.TimeoutError as error:
            raise ServerError(f"the prompt did not finish within {timeout:.0f} s") from error
        except aiohttp.ClientError as error:
            raise ServerError(f"the server went away: {error}{self._last_words()}") from error
        try:
            return self.json(f"/history/{prompt_id}")[prompt_id]["outputs"]
        except OSError as error:
            raise ServerError(f"the server went away: {error}{self._last_words()}") from error

    async def _follow(self, prompt: Prompt, progress: Progress | None) -> str:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(self.address) as session,
            session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as feed,
        ):
            prompt_id = await self._queue(session, prompt, client)
            async for message in feed:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") != prompt_id:
                    continue
                if kind == "execution_error":
                    raise NodeError(data["node_id"], data["node_type"], data["exception_message"].strip())
                if kind == "execution_interrupted":
                    raise NodeError(data["node_id"], data["node_type"], "interrupted")
                if kind == "executing" and data["node"] is None:
                    return prompt_id
                if progress and kind in ("executing", "progress") and data["node"] in prompt:
                    progress(prompt[data["node"]]["class_type"], data.get("value", 0), data.get("max", 0))
        raise ServerError(f"the server went away{self._last_words()}")

    async def _queue(self, session: aiohttp.ClientSession, prompt: Prompt, client: str) -> str:
        async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            body = await answer.json()
        # The server also accepts a prompt with only some valid outputs; that counts as a failure here.
        for node_id, entry in (body.get("node_errors") or {}).items():
            if entry["errors"]:
                reasons = "; ".join(f"{error['message']}: {error['details']}" for error in entry["errors"])
                raise NodeError(node_id, entry["class_type"], reasons)
        if answer.status == 200:
            return body["prompt_id"]
        error = body["error"]
        raise NodeError("?", "prompt", f"{error['message']} {error.get('details', '')}".strip())


class Server(Client):
    """A running ComfyUI with the pack and no other, on a free port; use it as a context manager.

    It ends with this process, even if that is killed, and removes its base directory.
    base: an existing one that holds the pack, instead of a new one with a link to it.
    """

    def __init__(
        self, comfyui: Path, arguments: list[str], start_timeout: float = 900, base: Path | None = None
    ) -> None:
        self.base = base or temporary_base()
        self.port = free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self._log = self.base / "server.log"
        command = server_command(comfyui, self.base, self.port, ["--disable-api-nodes", *arguments])
        command = [sys.executable, str(GUARD), *command]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.base,
                env=environment(),
            )
        try:
            self._wait_until_ready(start_timeout)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting; its last words:\n{self.log_tail()}")
            try:
                self.json("/system_stats")
            except OSError:
                time.sleep(0.3)
            else:
                return
        raise ServerError(f"ComfyUI did not start within {timeout:.0f} s; its last words:\n{self.log_tail()}")

    @property
    def process_id(self) -> int:
        """Of the process whose child is the server."""
        return self._process.pid

    def log_tail(self, lines: int = 25) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _last_words(self) -> str:
        return f"; its last words:\n{self.log_tail()}"

    def stop(self) -> None:
        """Stop the server and remove its base directory."""
        self._process.communicate()  # closes the pipe, at which the guard ends the server
        shutil.rmtree(self.base, ignore_errors=True)


def serve(argv: list[str] | None = None) -> int:
    """Run the web page in the foreground, with ComfyUI's own model folders."""
    parser = argparse.ArgumentParser(prog="dev.py serve", description="ComfyUI's web page with the pack.")
    parser.add_argument("--port", type=int, default=8188)
    options = parser.parse_args(argv)
    comfyui = Path(os.environ["COMFYUI_PATH"])
    arguments = ["--models-directory", str(comfyui / "models"), *device_arguments()]
    command = server_command(comfyui, make_base(STATE / "base"), options.port, arguments)
    process = subprocess.Popen(command, env=environment())
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(serve())
