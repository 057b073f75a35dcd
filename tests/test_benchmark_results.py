"""A run's folder that is killed and continued, the numbers counted from it, and the report."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host import Host
from PIL import Image
from test_benchmark_cases import write_cases, write_method


@pytest.fixture
def results(host: Host) -> Any:
    """The module."""
    return host.pack_module("lab.benchmark.results")


@pytest.fixture
def statistics(host: Host) -> Any:
    """The module."""
    return host.pack_module("lab.benchmark.statistics")


def result(method: str, case: str, swept: Any = None, kind: str = "t", **metrics: float) -> dict[str, Any]:
    name = method.split()[0]
    head = {"method": method, "name": name, "swept": swept, "case": case, "type": kind, "seconds": 1.0}
    return {**head, "metrics": metrics}


def test_torn_line_is_dropped(results: Any, tmp_path: Path) -> None:
    """Protects: a run that was killed while it wrote a line continues and repeats that edit."""
    run = results.Results(tmp_path)
    run.append(result("m", "a", psnr=20.0))
    run.append(result("m", "b", psnr=21.0))
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    for cut in range(whole.index(b"\n") + 2, len(whole)):
        file.write_bytes(whole[:cut])
        run = results.Results(tmp_path)
        assert run.done == {("m", "a")}
        run.append(result("m", "b", psnr=21.0))
        assert file.read_bytes() == whole


def test_failed_edits_are_done_again(results: Any, tmp_path: Path) -> None:
    """Protects: a failed edit is tried again by the next run, and an edit never has two lines."""
    run = results.Results(tmp_path)
    run.append({**result("m", "a"), "error": "the server went away"})
    run.append(result("m", "b", psnr=21.0))
    run.append(result("m", "b", psnr=99.0))
    assert len(results.read_results(tmp_path)) == 2
    run = results.Results(tmp_path)
    assert run.done == {("m", "b")}
    run.append(result("m", "a", psnr=20.0))
    found = {(entry["case"], entry["metrics"]["psnr"]) for entry in results.read_results(tmp_path)}
    assert found == {("a", 20.0), ("b", 21.0)}


@pytest.mark.parametrize("extra", ["{broken}\n", '{"method": "m", "case": "a"}\n'], ids=["broken", "double"])
def test_damaged_results_are_refused(results: Any, tmp_path: Path, extra: str) -> None:
    """Protects: a broken line in the middle and an edit with two lines are refused, naming the line."""
    good = json.dumps(result("m", "a"))
    (tmp_path / "results.jsonl").write_text(f"{good}\n{extra}{json.dumps(result('m', 'c'))}\n")
    with pytest.raises(ValueError, match="line 2 is"):
        results.Results(tmp_path)


def test_other_run_is_refused(results: Any, host: Host, tmp_path: Path) -> None:
    """Protects: results of another benchmark, or of another workflow with that name, are never mixed in."""
    methods = host.pack_module("lab.benchmark.methods")
    found = methods.read_methods([write_method(tmp_path)])
    out, where = tmp_path / "run", {"layout": "folder", "folder": "x", "split": "test"}
    results.write_run(out, results.check_run(out, where, found))
    results.check_run(out, where, found)
    with pytest.raises(ValueError, match="holds results of"):
        results.check_run(out, {**where, "folder": "y"}, found)
    workflow = json.loads((tmp_path / "workflow.json").read_text())
    workflow["1"]["inputs"]["upload"] = "image"
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    with pytest.raises(ValueError, match="another workflow named 'm'"):
        results.check_run(out, where, methods.read_methods([tmp_path / "method.json"]))


def test_interval_is_the_bootstrap(statistics: Any) -> None:
    """Protects: mean and interval agree with the distribution over every possible resample."""
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = statistics.estimate(values)
    means = np.array([np.mean(sample) for sample in itertools.product(values, repeat=5)])
    assert found.mean == pytest.approx(6.2)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.5)
    assert found.cases == 5
    assert np.isnan(statistics.estimate([3.0]).low)
    assert statistics.estimate([]).cases == 0


def test_difference_is_paired(statistics: Any) -> None:
    """Protects: two methods are compared case by case, on the cases that both have."""
    first = {"a": 1.0, "b": 10.0, "c": 100.0, "only": 5.0}
    second = {"a": 2.0, "b": 11.0, "c": 101.0, "other": 7.0}
    found = statistics.difference(first, second)
    assert (found.mean, found.low, found.high, found.cases) == (1.0, 1.0, 1.0, 3)


def test_report(results: Any, host: Host, tmp_path: Path) -> None:
    """Protects: tables hold the means and paired differences, the page reasons, curve and pictures."""
    report = host.pack_module("lab.benchmark.html_report")
    names = [f"c{number}" for number in range(6)]
    write_cases(tmp_path / "set", *({"id": name, "type": f"t{i % 2}"} for i, name in enumerate(names)))
    out = tmp_path / "run"
    run = results.Results(out)
    for value in (1.0, 2.0):
        for i, name in enumerate(names):
            metrics = {"psnr": 20.0 + i, "success": float(i % 3 == 0), "lpips": 0.1 * value}
            run.append(result(f"m x={value:g}", name, ["x", value], f"t{i % 2}", **metrics))
            results.save_picture(out, f"m x={value:g}", name, Image.new("RGB", (24, 16), (0, 200, 0)))
    run.append({**result("m x=2", "lost"), "error": "the <server> went away"})
    where = {"layout": "folder", "folder": str(tmp_path / "set"), "split": "test"}
    results.write_run(out, {"benchmark": where, "methods": {}, "missing": {"clip_t": "no CLIP was given"}})
    tables = report.write_report(out)
    with (out / "tables" / "overall.csv").open(newline="") as file:
        rows = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["m x=1", "psnr"]["mean"]) == 22.5
    assert rows["m x=1", "psnr"]["cases"] == "6"
    with (out / "tables" / "by_type.csv").open(newline="") as file:
        kinds = {(row["method"], row["type"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(kinds["m x=2", "t1", "psnr"]["mean"]) == 23.0
    with (out / "tables" / "comparison.csv").open(newline="") as file:
        less = {row["metric"]: row for row in csv.DictReader(file)}
    assert float(less["lpips"]["mean"]) == pytest.approx(0.1)
    with (out / "tables" / "tradeoff.csv").open(newline="") as file:
        assert [row["swept"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    assert len(tables.failures) == 1
    page = (out / "report.html").read_text()
    for text in ("clip_t</code>: no CLIP was given", "<svg", "the &lt;server&gt;"):
        assert text in page
    for title in ("best", "median", "worst"):
        assert page.count(f'<h4>{title}</h4><img src="data:image/jpeg;base64,') == 2
    assert 'src="http' not in page


def test_best_and_worst(host: Host) -> None:
    """Protects: the best result has the better value, also for a metric where lower is better."""
    report = host.pack_module("lab.benchmark.html_report")
    results = [result("m", str(value), lpips=value / 10, psnr=float(value)) for value in (3, 1, 2, 5, 4)]
    for metric, order in (("lpips", "135"), ("psnr", "531")):
        found = report.chosen(results, metric)
        assert "".join(found[title][0]["case"] for title in ("best", "median", "worst")) == order
