"""The benchmark with more than one ComfyUI, and the whole command with the methods that ship."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from host import ROOT, Host, comfyui_path
from test_benchmark_cases import paint, write, write_cases

# Large in the middle, so that it takes a while.
SCALE = {"upscale_method": "lanczos", "crop": "disabled"}
SLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": ""}},
    "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "width": 4096, "height": 4096, **SCALE}},
    "3": {"class_type": "ImageScale", "inputs": {"image": ["2", 0], "width": 48, "height": 40, **SCALE}},
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    "5": {"class_type": "PrimitiveString", "inputs": {"value": ""}},
}
SLOTS = {"source_image": "1.image", "edit_description": "5.value", "output": "4"}
SHIPPED = ROOT / "lab" / "benchmark" / "tiny"


@pytest.fixture
def bench(host: Host) -> SimpleNamespace:
    """The modules."""
    names = ("layouts", "command", "methods", "results", "run_local", "scorer")
    found = {name: host.pack_module(f"lab.benchmark.{name}") for name in names}
    return SimpleNamespace(worker=host.pack_module("lab.benchmark.comfy_worker"), **found)


def kill_at_work(client: Any, killed: list[psutil.Process]) -> None:
    """Kill a ComfyUI of ours as soon as it executes a prompt."""
    while not client.json("/queue")["queue_running"]:
        time.sleep(0.02)
    (process,) = psutil.Process(client._process.pid).children()
    process.kill()
    killed.append(process)


def test_one_of_two_servers_is_killed(live_server: Any, bench: SimpleNamespace, tmp_path: Path) -> None:
    """Protects: two ComfyUIs share the edits; one of ours that is killed within a prompt is started again and
    does that edit, nothing is lost or doubled, and nothing of it is left.
    """
    write(tmp_path / "workflow.json", SLOW)
    write(tmp_path / "method.json", {"name": "m", "workflow": "workflow.json", "slots": SLOTS})
    names = [f"c{number}" for number in range(8)]
    # Pictures of their own, since a ComfyUI does not execute the same prompt twice.
    write_cases(tmp_path / "set", *({"id": name, "source_image": f"{name}.png"} for name in names))
    for number, name in enumerate(names):
        paint(tmp_path / "set" / f"{name}.png", (200, 30, 10 * number))
    methods = bench.methods.read_methods([tmp_path / "method.json"])
    tasks = [(methods[0], case) for case in bench.layouts.read_cases("folder", tmp_path / "set", "test")]
    done: dict[str, list[str]] = {}
    clients: list[Any] = []

    class Worker(bench.worker.ComfyWorker):
        def edit(self, method: Any, case: Any) -> Any:
            outcome = super().edit(method, case)
            done.setdefault(self.name, []).append(case.id)
            return outcome

    (own,) = bench.worker.own_workers(comfyui_path(), 1, methods)
    start = own._start
    own = Worker("own", lambda: clients.append(start()) or clients[-1], methods)
    other = Worker("other", lambda: bench.worker.Client(live_server.address), methods)
    own.connect()
    killed: list[psutil.Process] = []
    killer = threading.Thread(target=kill_at_work, args=(clients[0], killed), daemon=True)
    killer.start()
    results = bench.results.Results(tmp_path / "run")
    bench.run_local.run(tasks, [own, other], bench.scorer.Scorer(), results)
    assert len(killed) == 1
    assert len(clients) == 2
    assert set(done) == {"own", "other"}
    assert sorted(done["own"] + done["other"]) == names
    lines = bench.results.read_results(tmp_path / "run")
    assert sorted(line["case"] for line in lines) == names
    assert [line["metrics"]["psnr"] > 40 for line in lines] == [True] * 8
    assert not any(client.base.exists() for client in clients)
    assert all(client._process.poll() is not None for client in clients)


def test_the_command(live_server: Any, bench: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    """Protects: `dev.py benchmark` runs the methods that ship on every edit type of the Tiny Studio and draws
    its report; asked again it has nothing to do.
    """
    for name, changes in (("bridge", {"sweep": {"image_guidance": [1.5]}}), ("unify", {})):
        method = json.loads((SHIPPED / f"{name}.json").read_text())
        method |= {"workflow": str(SHIPPED / method["workflow"]), "values": {"steps": 6}, **changes}
        write(tmp_path / f"{name}.json", method)
    out, figures = tmp_path / "run", tmp_path / "figures.json"
    words = ["--out", out, "--per-type", "1", "--server", live_server.address, "--json", figures]
    words += ["--method", tmp_path / "bridge.json", "--method", tmp_path / "unify.json"]
    words = list(map(str, words))
    command = [sys.executable, str(ROOT / "dev.py"), "benchmark", *words]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path()), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = bench.results.read_results(out)
    assert len(lines) == 12
    assert not any("error" in line for line in lines)
    labels = {"bridge image_guidance=1.5", "UnifyEdit"}
    assert {line["method"] for line in lines} == labels
    assert len({line["type"] for line in lines}) == 6
    means = json.loads(figures.read_text())
    for label in labels:
        values = [line["metrics"]["target_psnr"] for line in lines if line["method"] == label]
        assert means[f"{label}.target_psnr"] == pytest.approx(sum(values) / 6)
        assert sum(values) / 6 > 10
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == 2 * 3
    before = (out / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert bench.command.main(words) == 0
    assert "6 cases, 2 methods, 0 edits to do" in capsys.readouterr().out
    assert (out / "results.jsonl").read_bytes() == before
