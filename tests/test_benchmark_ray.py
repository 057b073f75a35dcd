"""The benchmark as a Ray Data job, on a cluster of two workers of which one is killed in the middle."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from host import ROOT, Host
from test_benchmark_cases import paint, write, write_cases
from test_benchmark_run import SLOTS, WORKFLOW

MARK = "DESCRIPTIVE_EDIT_TEST"


def wait_for_reader(pipe: Path, job: subprocess.Popen) -> int | None:
    """Open a pipe for writing, which is possible once somebody reads it; None if the job ends first."""
    while job.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.2)
    return None


def family(mark: str) -> list[psutil.Process]:
    """All processes that run with this MARK, whoever is their parent by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def reader(pipe: Path, workers: list[psutil.Process]) -> psutil.Process:
    """The worker that waits for the pipe's content."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for worker in workers:
            if any(entry.resolve() == pipe for entry in Path(f"/proc/{worker.pid}/fd").iterdir()):
                return worker
    pytest.fail("no worker reads")


def test_worker_killed_in_the_middle(tmp_path: Path) -> None:
    """Protects: a worker that is killed within a batch loses no edit and doubles none, and leaves no ComfyUI.

    One case's true edit is a pipe, so the worker that measures it waits there to be killed.
    """
    write(tmp_path / "workflow.json", WORKFLOW)
    write(
        tmp_path / "method.json",
        {"name": "m", "workflow": "workflow.json", "slots": SLOTS, "values": {"blend": 0}},
    )
    pipe = tmp_path / "set" / "pipe.png"
    names = [f"c{number}" for number in range(8)]
    write_cases(
        tmp_path / "set",
        *({"id": name} for name in names[:3]),
        {"id": "c3", "target_image": pipe.name},
        *({"id": name} for name in names[4:]),
    )
    os.mkfifo(pipe)
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "dev.py", "benchmark", "--out", out, "--layout", "folder"]
    command += ["--data", tmp_path / "set", "--method", tmp_path / "method.json"]
    command += ["--ray", "--workers", "2", "--batch", "2"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", MARK: str(out)}
    environment["RAY_worker_niceness"] = "0"  # not the 15 that Ray takes, which starve on a busy machine
    # Ray gives itself half a minute to start, too short on a busy machine: the same command continues.
    for _ in range(3):
        job = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        writer = wait_for_reader(pipe, job)
        if writer is not None:
            break
    assert writer is not None, job.communicate()[0].decode()
    try:
        workers = [child for child in family(str(out)) if "MapWorker" in " ".join(child.cmdline())]
        assert len(workers) == 2
        victim = reader(pipe, workers)
        assert any("main.py" in " ".join(child.cmdline()) for child in victim.children(recursive=True))
        pipe.unlink()
        paint(pipe)
        victim.kill()
        os.close(writer)
        output, _ = job.communicate(timeout=600)
    finally:
        job.terminate()
    assert job.returncode == 0, output.decode()
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(line["case"] for line in lines) == names
    assert not any("error" in line for line in lines)
    assert [line["metrics"]["psnr"] for line in lines] == [100] * 8
    assert not psutil.wait_procs(family(str(out)), timeout=30)[1]


def test_without_ray(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects: without Ray the command says what to install."""
    run_ray: Any = host.pack_module("lab.benchmark.run_ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    results = host.pack_module("lab.benchmark.results").Results(tmp_path)
    with pytest.raises(ImportError, match=r"pip install -r lab/requirements\.txt"):
        run_ray.run([], argparse.Namespace(), results)
