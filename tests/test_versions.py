"""The oldest Python and torch that are promised: what the pack uses is in them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host import ROOT, Host, comfyui_path

# In a process of its own, with what is newer than torch 2.5 taken away, a host loads the pack.
LOAD = """
import asyncio, json, sys, torch
sys.path.insert(0, {tests!r})
import host
host.prepare()
import nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
if hasattr(torch.optim, "Muon"):
    del torch.optim.Muon
own = set(nodes.NODE_CLASS_MAPPINGS)
done = asyncio.run(nodes.load_custom_node({pack!r}))
name = {pack!r}.replace(".", "_x_")
modules = [module.removeprefix(name + ".") for module in sys.modules if module.startswith(name + ".")]
found = sorted(set(nodes.NODE_CLASS_MAPPINGS) - own)
print(json.dumps({{"done": done, "nodes": found, "modules": modules}}))
"""
# Newer than Python 3.10 (docs.python.org, "What's new"): names by module, and methods.
NEWER_MODULES = {"tomllib", "_interpreters", "concurrent.interpreters", "annotationlib"}
NEWER_NAMES = {
    "asyncio": {"TaskGroup", "Runner", "timeout", "timeout_at"},
    "collections.abc": {"Buffer"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "verify", "ReprEnum", "member", "nonmember", "global_enum"},
    "hashlib": {"file_digest"},
    "inspect": {"getmembers_static", "markcoroutinefunction"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "operator": {"call"},
    "typing": {
        *("Self", "Never", "assert_never", "assert_type", "LiteralString", "Required", "NotRequired"),
        *("Unpack", "TypeVarTuple", "override", "reveal_type", "dataclass_transform", "TypeAliasType"),
        *("TypeIs", "ReadOnly", "get_overloads"),
    },
    "warnings": {"deprecated"},
}
NEWER_METHODS = {"add_note", "full_match", "from_uri"}
NEWER_BUILTINS = {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"}
# Newer than torch 2.5 (the release notes of 2.6 to 2.14), as far as a node pack would use it.
NEWER_TORCH = {
    "torch.optim.Muon",
    "torch.accelerator",
    "torch.AcceleratorError",
    "torch.compiler.set_stance",
    "torch.nn.attention.varlen",
    "torch.float8_e8m0fnu",
    "torch.float4_e2m1fn_x2",
}


def shipped() -> list[Path]:
    """The files that a user's Python runs."""
    folders = ("nodes", "patches", "models", "training", "metrics", "pictures", "lab")
    return [ROOT / "__init__.py", *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression, empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def newer(source: str) -> list[str]:
    """What a file uses that Python 3.10 or torch 2.5 does not have."""
    try:
        tree = ast.parse(source, feature_version=(3, 10))
    except SyntaxError as error:
        return [f"syntax: {error.msg}"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in NEWER_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += [node.module] if node.module in NEWER_MODULES else []
            found += sorted(names & NEWER_NAMES.get(node.module or "", set()))
        elif isinstance(node, ast.Attribute):
            whole = dotted(node)
            found += [whole] if whole in NEWER_TORCH else []
            module, _, name = whole.rpartition(".")
            found += [whole] if name in NEWER_NAMES.get(module, set()) else []
        elif isinstance(node, ast.Name) and node.id in NEWER_BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # Both need their byteorder until Python 3.11.
            bare = node.func.attr in ("from_bytes", "to_bytes") and not node.keywords
            found += [node.func.attr] if bare and len(node.args) < 2 else []
            found += [node.func.attr] if node.func.attr in NEWER_METHODS else []
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import tomllib", "tomllib"),
        ("from typing import Self", "Self"),
        ("import datetime\ndatetime.UTC", "datetime.UTC"),
        ("import itertools\nitertools.batched", "itertools.batched"),
        ("from enum import StrEnum", "StrEnum"),
        ("int.from_bytes(b'1')", "from_bytes"),
        ("import torch\ntorch.optim.Muon", "torch.optim.Muon"),
        ("try:\n    pass\nexcept* ValueError:\n    pass", "syntax"),
        ("def f[T](x: T) -> T: ...", "syntax"),
        ("error.add_note('x')", "add_note"),
    ],
)
def test_the_check_finds(source: str, name: str) -> None:
    """Protects: the check below knows what it looks for."""
    assert any(found.startswith(name) for found in newer(source)), newer(source)


def test_nothing_newer_is_used() -> None:
    """Protects: no file of the pack has syntax or names that Python 3.10 and torch 2.5 do not have."""
    found = {file.relative_to(ROOT).as_posix(): newer(file.read_text(encoding="utf-8")) for file in shipped()}
    assert len(found) > 50
    assert {name: names for name, names in found.items() if names} == {}


def test_the_pack_loads_without_muon(host: Host) -> None:
    """Protects: on a torch that has no Muon every node is there, and nothing is imported at the start that
    only a training needs.
    """
    script = LOAD.format(tests=str(ROOT / "tests"), pack=str(ROOT))
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path())}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["done"]
    assert found["nodes"] == sorted(host.node_ids())
    later = {"trainer", "cache", "pairs", "sources", "command", "config", "validation", "memory"}
    assert not {f"training.{name}" for name in later} & set(found["modules"])


def test_muon_is_asked_for_without_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: asking for Muon on a torch that has none is one readable line; AdamW works there."""
    settings = host.pack_module("training.settings").TrainSettings
    monkeypatch.delattr(torch.optim, "Muon")
    assert settings().optimiser == "adamw"
    with pytest.raises(
        ValueError, match=r"optimiser is 'muon', which needs torch 2.9 .* update torch, or take"
    ):
        settings(optimiser="muon")


def test_the_checks_run_the_oldest() -> None:
    """Protects: what the project file promises of Python is what the checks on GitHub run, with the oldest
    torch.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project)
    checks = (ROOT / ".github" / "workflows" / "checks.yml").read_text(encoding="utf-8")
    job = re.search(r"  oldest-python:.*?(?=\n  \w[\w-]*:\n|\Z)", checks, re.DOTALL)
    assert oldest is not None
    assert job is not None
    assert f'python-version: "{oldest[1]}"' in job[0]
    assert "torch==2.5.1" in job[0]
