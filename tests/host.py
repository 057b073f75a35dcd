"""A ComfyUI for the tests: inside this process, and as a running server.

`prepare` makes the host importable and must run before anything imports `comfy`; conftest does so. `device`
is the one that models run on: a tensor that a test hands to a network by itself belongs there. `Host` loads
the pack through the host's own loader and runs nodes and graphs the way its executor does.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _load_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


server = _load_file("descriptive_edit_server", ROOT / "lab" / "server.py")
NodeError = server.NodeError
Prompt = dict[str, dict[str, Any]]
_on_cpu = True


def comfyui_path() -> Path:
    """The ComfyUI to test with: COMFYUI_PATH, or the one dev.py installs."""
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui" / "ComfyUI").resolve()
    if not (path / "main.py").is_file():
        raise RuntimeError(f"no ComfyUI in {path}: run `python dev.py test`, which installs one")
    return path


def prepare(device_type: str = "cpu") -> None:
    """Put the host on the import path and give it its arguments: the device, and a base directory of its own.

    One thread of the CPU, here and in what is started from here. On a card float32 is float32, and what has a
    deterministic kernel uses it; RuntimeError if there is none.
    """
    global _on_cpu
    _on_cpu = device_type == "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for what is started from here
    if not _on_cpu:  # for dynamic VRAM, as main.py does: before torch is there
        importlib.import_module("comfy_aimdo.control").init()
    import torch

    torch.set_num_threads(1)
    if not _on_cpu:
        if not torch.cuda.is_available():
            raise RuntimeError(f"--device {device_type}: torch {torch.__version__} finds no such device here")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    base = server.temporary_base()
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    # Before everything else: the host's `nodes` must win over ours.
    sys.path.insert(0, str(comfyui_path()))
    kind = server_arguments() or ["--deterministic"]
    arguments, sys.argv = sys.argv, ["main.py", *kind, "--base-directory", str(base)]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = arguments


def server_arguments() -> list[str]:
    """What a server of the tests is started with, so that it runs on the device that was asked for."""
    return ["--cpu"] if _on_cpu else []


def device() -> Any:
    """The torch.device that the host runs models on."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


class _Collector(logging.Handler):
    """Keeps the warnings of the host's loader, which reports failures in no other way."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Host:
    """The host in this process, with the pack loaded once."""

    def __init__(self) -> None:
        import execution
        import folder_paths
        from server import PromptServer

        import nodes

        self._nodes, self._execution = nodes, execution
        self.base = Path(folder_paths.base_path)
        self._server = PromptServer(asyncio.new_event_loop())
        self.events: list[tuple[str, Any]] = []
        self._server.send_sync = lambda event, data, sid=None: self.events.append((event, data))
        collector = _Collector()
        logging.getLogger().addHandler(collector)
        try:
            asyncio.run(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
        finally:
            logging.getLogger().removeHandler(collector)
        path = self.base / "custom_nodes" / server.PACK_FOLDER
        self.load_warnings = [text for text in collector.messages if server.PACK_FOLDER in text]
        self.pack: ModuleType = sys.modules[str(path).replace(".", "_x_")]
        if self.load_warnings:
            raise RuntimeError("the host could not load the pack:\n" + "\n".join(self.load_warnings))

    def pack_module(self, name: str) -> ModuleType:
        """A module of the loaded pack, such as `patches.unify`."""
        return importlib.import_module(f".{name}", self.pack.__name__)

    def network(self, model: Any) -> Any:
        """A MODEL's network as the pack's methods see it."""
        networks = self.pack_module("patches.attention.networks")
        return networks.network_of(model.model.diffusion_model)

    def node_ids(self) -> list[str]:
        """The ids of the nodes that came from the pack."""
        wanted = f"custom_nodes.{server.PACK_FOLDER}"
        nodes = self._nodes.NODE_CLASS_MAPPINGS.items()
        return [name for name, node in nodes if getattr(node, "RELATIVE_PYTHON_MODULE", None) == wanted]

    def node(self, node_id: str) -> Any:
        """A node class, ours or the host's own."""
        return self._nodes.NODE_CLASS_MAPPINGS[node_id]

    def execute(self, node_id: str, **inputs: Any) -> tuple[Any, ...]:
        """Run one node as the executor does, in inference mode; inputs left out take the widget's default."""
        import torch

        node = self.node(node_id)
        values = {name: [value] for name, value in {**_defaults(node), **inputs}.items()}
        with torch.inference_mode():
            output, _, _, _ = asyncio.run(
                self._execution.get_output_data("test", "1", node(), values, v3_data={"hidden_inputs": {}})
            )
        return tuple(slot[0] for slot in output)

    def executor(self) -> Any:
        """An executor that keeps its cache, for `run_graph` calls that belong together."""
        cache = {"lru": 0, "ram": 0, "ram_inactive": 0}
        return self._execution.PromptExecutor(
            self._server, cache_type=self._execution.CacheType.CLASSIC, cache_args=cache
        )

    def run_graph(self, prompt: Prompt, executor: Any = None) -> dict[str, tuple[Any, ...]]:
        """Validate and run an API-format prompt; returns what every node put out, or raises NodeError."""
        executor = executor or self.executor()
        valid, error, outputs, node_errors = asyncio.run(
            self._execution.validate_prompt("test", prompt, None)
        )
        for node_id, entry in node_errors.items():
            reasons = "; ".join(f"{item['message']}: {item['details']}" for item in entry["errors"])
            raise NodeError(node_id, entry["class_type"], reasons)
        if not valid:
            raise NodeError("?", "prompt", f"{error['message']} {error['details']}")
        executor.execute(prompt, "test", {}, outputs)
        for event, data in executor.status_messages:
            if event in ("execution_error", "execution_interrupted"):
                message = data.get("exception_message", "interrupted").strip()
                raise NodeError(data["node_id"], data["node_type"], message)
        return asyncio.run(_outputs(executor, prompt))


def _defaults(node: Any) -> dict[str, Any]:
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in node.INPUT_TYPES().get(group, {}).items():
            settings = options[0] if options else {}
            choices = kind if isinstance(kind, list) else settings.get("options")
            if "default" in settings:
                found[name] = settings["default"]
            elif choices and group == "required":
                found[name] = choices[0]
    return found


async def _outputs(executor: Any, prompt: Prompt) -> dict[str, tuple[Any, ...]]:
    found = {}
    for node_id in prompt:
        entry = await executor.caches.outputs.get(node_id)
        if entry is not None:
            found[node_id] = tuple(slot[0] if len(slot) == 1 else slot for slot in entry.outputs)
    return found


def live_server() -> Any:
    """A running server on a free port; see lab/server.py for what it can do."""
    return server.Server(comfyui_path(), server_arguments())
