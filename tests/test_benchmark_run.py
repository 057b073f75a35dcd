"""The benchmark on a real server: methods of stock nodes, servers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host import Host, server
from PIL import Image
from test_benchmark_cases import paint, write, write_cases

WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": ""}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {
        "class_type": "ImageBlend",
        "inputs": {"image1": ["1", 0], "image2": ["2", 0], "blend_factor": 0.5, "blend_mode": "normal"},
    },
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    "5": {"class_type": "PrimitiveString", "inputs": {"value": ""}},
}
SLOTS = {"source_image": "1.image", "edit_description": "5.value", "blend": "3.blend_factor", "output": "4"}


@pytest.fixture
def bench(host: Host) -> SimpleNamespace:
    """The modules."""
    names = ("layouts", "methods", "results", "run_local", "scorer")
    found = {name: host.pack_module(f"lab.benchmark.{name}") for name in names}
    return SimpleNamespace(worker=host.pack_module("lab.benchmark.comfy_worker"), **found)


@pytest.fixture
def setting(bench: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """Two methods, three cases of which one lacks its picture, and a run's folder."""
    write(tmp_path / "workflow.json", WORKFLOW)
    write(
        tmp_path / "method.json",
        {"name": "m", "workflow": "workflow.json", "slots": SLOTS, "sweep": {"blend": [0.0, 1.0]}},
    )
    paint(tmp_path / "set" / "mask.png", 255, "L")
    write_cases(
        tmp_path / "set",
        {"id": "a", "mask": "mask.png"},
        {"id": "b"},
        {"id": "c", "source_image": "gone.png"},
    )
    methods = bench.methods.read_methods([tmp_path / "method.json"])
    cases = bench.layouts.read_cases("folder", tmp_path / "set", "test")
    return SimpleNamespace(methods=methods, cases=cases, out=tmp_path / "run")


def run(bench: SimpleNamespace, setting: SimpleNamespace, start: Any) -> list[dict[str, Any]]:
    results = bench.results.Results(setting.out)
    worker = bench.worker.ComfyWorker("ComfyUI", start, setting.methods)
    tasks = results.missing(setting.methods, setting.cases)
    bench.run_local.run(tasks, [worker], bench.scorer.Scorer(), results)
    return bench.results.read_results(setting.out)


def test_run_on_a_server(live_server: Any, bench: SimpleNamespace, setting: SimpleNamespace) -> None:
    """Protects: every case goes through every method, metrics fit the images, a missing image is reported."""
    lines = run(bench, setting, lambda: bench.worker.Client(live_server.address))
    assert {(line["method"], line["case"]) for line in lines} == {
        (f"m blend={value}", case) for value in (0, 1) for case in "abc"
    }
    by_key = {(line["method"], line["case"]): line for line in lines}
    assert by_key["m blend=0", "a"]["metrics"]["psnr"] == 100
    source = np.array([200, 30, 20]) / 255
    expected = float(np.mean(np.abs(1 - 2 * source)))
    assert by_key["m blend=1", "b"]["metrics"]["l1"] == pytest.approx(expected, abs=1 / 255)
    assert by_key["m blend=1", "a"]["metrics"]["l1_outside"] is None
    assert "source_image gone.png is missing" in by_key["m blend=0", "c"]["error"]
    with Image.open(bench.results.picture_file(setting.out, "m blend=1", "a")) as picture:
        assert picture.getpixel((0, 0)) == pytest.approx((55, 225, 235), abs=1)  # the host rounds down
    again = bench.results.Results(setting.out)
    assert {case.id for _, case in again.missing(setting.methods, setting.cases)} == {"c"}


def test_server_dies_in_the_middle(
    live_server: Any, bench: SimpleNamespace, setting: SimpleNamespace
) -> None:
    """Protects: an edit during which the server died is done again on the one started next."""

    class Dying(bench.worker.Client):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            raise bench.worker.ServerError("the server went away")

    started: list[type] = []

    def start() -> Any:
        kind = bench.worker.Client if started else Dying
        started.append(kind)
        return kind(live_server.address)

    setting.cases = setting.cases[:2]
    lines = run(bench, setting, start)
    assert len(started) == 2
    assert len(lines) == 4
    assert not any("error" in line for line in lines)


def test_no_server(bench: SimpleNamespace, setting: SimpleNamespace) -> None:
    """Protects: a server that is not there ends the run, and nothing is written for what was not tried."""
    address = f"http://127.0.0.1:{server.free_port()}"
    results = bench.results.Results(setting.out)
    worker = bench.worker.ComfyWorker(address, lambda: bench.worker.Client(address), setting.methods)
    tasks = results.missing(setting.methods, setting.cases)
    bench.run_local.run(tasks, [worker], bench.scorer.Scorer(), results)
    assert results.all == []
    with pytest.raises(bench.worker.WorkerGone):
        worker.connect()


def test_unknown_node(live_server: Any, bench: SimpleNamespace, setting: SimpleNamespace) -> None:
    """Protects: a server without a method's nodes is given up at once, and they are named."""
    setting.methods[0].prompt["2"]["class_type"] = "NodeOfAnotherPack"
    worker = bench.worker.ComfyWorker("s", lambda: bench.worker.Client(live_server.address), setting.methods)
    with pytest.raises(bench.worker.WorkerGone, match="s has no NodeOfAnotherPack, which m blend=0 needs"):
        worker.connect()


def test_missing_networks_have_reasons(bench: SimpleNamespace, setting: SimpleNamespace) -> None:
    """Protects: each network that is not there is named with the reason, and its metrics are left out."""
    scorer = bench.scorer.Scorer()
    assert {"dino_i", "structure_distance", "clip_i", "clip_t"} <= set(scorer.missing)
    assert all(scorer.missing.values())
    case = setting.cases[0]
    found = scorer.measure(case, case.read("source_image"))
    assert not set(scorer.missing) & set(found)
    assert json.loads(json.dumps(found))["psnr"] == 100
