"""Runs a module of the pack inside ComfyUI, for `python -m training` and dev.py. Standard library only."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import types
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "descriptive_edit"


def register_package() -> None:
    """Make the rooms importable as `descriptive_edit.<room>` without the pack's `__init__`."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package


def enter(comfyui: str) -> None:
    """Make ComfyUI and the rooms importable in this process, which runs the Python of that ComfyUI."""
    sys.path.insert(0, comfyui)
    torch = importlib.import_module("torch")
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    sys.argv = ["main.py", *(["--cpu"] if cpu else [])]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.cli_args")
    register_package()


def run_inside(module: str, arguments: Sequence[str]) -> None:
    """Run one module of the pack as the main program, with the ComfyUI of COMFYUI_PATH importable."""
    del sys.path[0]  # the pack's folder, whose `nodes` would hide the host's
    enter(os.environ["COMFYUI_PATH"])
    sys.argv = [module, *arguments]
    runpy.run_module(f"{PACKAGE}.{module}", run_name="__main__", alter_sys=True)
