"""The registry's archive: what is in it, and that it works alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host import ROOT, Host, comfyui_path, server, server_arguments

PARTS = {
    *("__init__.py", "nodes", "patches", "models", "metrics", "pictures", "training"),
    *("web", "locales", "workflows", "subgraphs"),
    *("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "requirements.txt", "icon.png"),
}
# README's links into these open in the repository only.
REPOSITORY_ONLY = ("docs/", "CONTRIBUTING.md", "SECURITY.md")


def tracked(*options: str) -> list[str]:
    command = ["git", "ls-files", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def archived() -> list[str]:
    """What the registry's tool packs: the files that git tracks, less those that .comfyignore names."""
    return sorted({*tracked()} - {*tracked("--cached", "--ignored", "--exclude-from=.comfyignore")})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A fresh base directory of ComfyUI with the archive unpacked in it, as the Manager does."""
    pack = tmp_path / "base" / "custom_nodes" / server.PACK_FOLDER
    for name in archived():
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, pack / name)
    return tmp_path / "base"


def test_what_is_in_it() -> None:
    """Protects: users get what a user needs, and nothing that works only in the repository."""
    assert {name.partition("/")[0] for name in archived()} == PARTS
    wanted = [
        f"models/tiny_studio/{name}.safetensors"
        for name in ("bridge", "flux_bridge", "tiny_flux", "tiny_studio")
    ]
    assert [name for name in archived() if name.endswith(".safetensors")] == wanted
    assert sum((ROOT / name).stat().st_size for name in archived()) < 37_000_000


def test_nothing_in_it_needs_the_rest() -> None:
    """Protects: no file of the archive imports the lab or dev.py."""
    outside = re.compile(r"^\s*(?:from|import)\s+\.*(?:lab|tests|dev)\b", re.MULTILINE)
    files = [name for name in archived() if name.endswith(".py")]
    assert len(files) > 50
    assert [name for name in files if outside.search((ROOT / name).read_text(encoding="utf-8"))] == []


def test_its_pages_name_no_command_of_the_repository() -> None:
    """Protects: help pages, tooltips and templates send nobody to dev.py, which an installed pack lacks."""
    texts = [name for name in archived() if name.startswith(("web/", "locales/", "workflows/", "subgraphs/"))]
    assert [name for name in texts if b"dev.py" in (ROOT / name).read_bytes()] == []


def test_readme_links_lead_somewhere() -> None:
    """Protects: relative links and pictures of the README are in the archive, or named as repository-only."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = {*re.findall(r"\]\(([^)#]+)", readme), *re.findall(r'(?:src|href)="([^"#]+)"', readme)}
    relative = {link for link in links if "://" not in link}
    assert len(relative) > 5
    assert relative - {*tracked()} == set()
    assert {link for link in relative - {*archived()} if not link.startswith(REPOSITORY_ONLY)} == set()


def test_it_works_alone(base: Path, host: Host) -> None:
    """Protects: a ComfyUI whose only pack is the archive has every node and draws the first template."""
    template = base / "custom_nodes" / server.PACK_FOLDER / "workflows" / "api" / "01 Start here.json"
    prompt = json.loads(template.read_text(encoding="utf-8"))
    (unify,) = [node for node in prompt.values() if node["class_type"] == "DescEditUnify"]
    unify["inputs"]["steps"] = 2
    with server.Server(comfyui_path(), server_arguments(), base=base) as running:
        found = {name for name in running.object_info() if name.startswith("DescEdit")}
        outputs = running.run(prompt)
        pictures = [
            item
            for output in outputs.values()
            for item in output.get("images", ())
            if item["type"] == "output"
        ]
        assert running.image(pictures[0]).startswith(b"\x89PNG")
    assert found == {*host.node_ids()}


def test_its_training_starts(base: Path) -> None:
    """Protects: `python -m training` from the archive's folder finds the ComfyUI and the pack's rooms."""
    pack = base / "custom_nodes" / server.PACK_FOLDER
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path())}
    command = [sys.executable, "-m", "training", "--print-config"]
    result = subprocess.run(command, cwd=pack, env=environment, capture_output=True, text=True, check=True)
    assert "base:" in result.stdout
