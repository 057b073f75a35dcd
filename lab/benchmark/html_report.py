"""The report of a run: CSV tables, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import importlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...models.files import write_bytes
from ...pictures.contact_sheet import draw_sheet, to_image
from .cases import Case, CaseError
from .layouts import read_cases
from .results import Result, picture_file, read_results
from .scorer import to_tensor
from .statistics import Estimate, value_of
from .tables import Tables, better, number

SIDE, EACH = 176, 3  # of a picture in the contact sheet; rows in it
_DIMMED = 0.3  # brightness outside the mask
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem }
h1, h2, h3, h4 { line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td small { color: #767676; display: block }
td.up { background: #dff3e3 } td.down { background: #fbe3e0 } svg, img { max-width: 100%; height: auto }
"""


def write_report(folder: Path, rank: str | None = None) -> Tables:
    """Write `tables/*.csv` and `report.html` into a run's folder; returns the tables.

    rank: the metric that orders the contact sheet.

    Raises ValueError if there are no results or no such metric, or if the benchmark has moved.
    """
    tables = Tables(read_results(folder))
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    where = run["benchmark"]
    data = Path(where["folder"]) if where["folder"] else None
    cases = {case.id: case for case in read_cases(where["layout"], data, where["split"])}
    metric = tables.ranked_by(rank)
    tables.write(folder / "tables")
    parts = [
        f"<h1>Edit benchmark: {html.escape(where['layout'])}</h1>",
        _summary(tables, run),
        _section("All cases", _overall(tables)),
        _section("Editability against fidelity", _tradeoff(tables)),
        _section("Compared on the same cases", _comparison(tables)),
        _section("Best, median and worst", _contact(folder, tables, cases, metric)),
        _section("By edit type", _by_type(tables)),
        _section("Failed edits", _failures(tables)),
    ]
    page = f"<!doctype html><meta charset=utf-8><title>Edit benchmark</title><style>{_STYLE}</style>"
    write_bytes(folder / "report.html", (page + "\n".join(parts)).encode())
    return tables


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _summary(tables: Tables, run: Mapping[str, Any]) -> str:
    where = run["benchmark"]
    cases = len({result["case"] for result in tables.results})
    text = (
        f"<p>{cases} cases of {html.escape(where['folder'] or where['layout'])}, "
        f"{len(tables.methods)} methods, {len(tables.failures)} failed edits. A cell is the mean over the "
        "cases with its 95% interval (bootstrap over the cases). An arrow shows which direction is better. "
        "Metrics without <code>target_</code> compare with the source, the others with the true edit. All "
        "metrics are in <code>tables/</code>.</p>"
    )
    missing = [f"<li><code>{name}</code>: {html.escape(why)}</li>" for name, why in run["missing"].items()]
    return text + (f"<p>Empty columns:</p><ul>{''.join(missing)}</ul>" if missing else "")


def _cell(found: Estimate | None, mark: str = "") -> str:
    if found is None or not found.cases:
        return "<td>-</td>"
    ends = "" if math.isnan(found.low) else f"{number(found.low)} &hellip; {number(found.high)}"
    return f"<td{mark}>{number(found.mean)}<small>{ends}</small></td>"


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in ("", *heads))
    body = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>" for name, cells in rows.items())
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _head(metric: str) -> str:
    return f"{metric} {('&darr;', '', '&uarr;')[better(metric) + 1]}"


def _overall(tables: Tables) -> str:
    rows = {
        method: [_cell(tables.overall.get((method, metric))) for metric in tables.shown]
        for method in tables.methods
    }
    return _table(list(map(_head, tables.shown)), rows)


def _by_type(tables: Tables) -> str:
    parts = []
    for metric in (name for name in tables.shown if name in tables.metrics):
        rows = {
            method: [_cell(tables.by_type.get((method, kind, metric))) for kind in tables.types]
            for method in tables.methods
        }
        parts.append(f"<h3>{_head(metric)}</h3>" + _table(list(map(html.escape, tables.types)), rows))
    return "".join(parts)


def _comparison(tables: Tables) -> str:
    first, *others = tables.methods
    if not others:
        return ""
    rows = {}
    for method in others:
        found = {metric: tables.differences[method, metric] for metric in tables.shown}
        rows[method] = [_cell(difference, _mark(difference, metric)) for metric, difference in found.items()]
    text = (
        f"<p>Each method minus <b>{html.escape(first)}</b>, case by case. Green is better and red is worse "
        "where the interval excludes 0.</p>"
    )
    return text + _table(list(map(_head, tables.shown)), rows)


def _mark(found: Estimate, metric: str) -> str:
    if math.isnan(found.low) or found.low <= 0 <= found.high:
        return ""
    return " class=up" if found.mean * better(metric) > 0 else " class=down"


def chosen(results: Sequence[Result], metric: str) -> dict[str, list[Result]]:
    """The best, median and worst results by a metric, without repetition."""
    known = [(value, r) for r in results if (value := value_of(r, metric)) is not None]
    known.sort(key=lambda pair: pair[0] * (better(metric) or 1), reverse=True)
    scored = [result for _, result in known]
    each = min(EACH, max(1, len(scored) // 3))
    if len(scored) < 3:
        return {"all": scored}
    middle = (len(scored) - each) // 2
    return {"best": scored[:each], "median": scored[middle : middle + each], "worst": scored[-each:]}


def _contact(folder: Path, tables: Tables, cases: Mapping[str, Case], metric: str) -> str:
    shown = [metric, *(name for name in (tables.editability, tables.fidelity) if name not in ("", metric))]
    parts = [f"<p>Ordered by <code>{metric}</code>.</p>"]
    for method in filter(tables.of, tables.methods):
        parts.append(f"<h3>{html.escape(method)}</h3>")
        for title, group in chosen(tables.of(method), metric).items():
            if group:
                rows = [(result, cases.get(result["case"])) for result in group]
                parts.append(f"<h4>{title}</h4>{_sheet(folder, rows, shown)}")
    return "".join(parts)


def _sheet(folder: Path, rows: Sequence[tuple[Result, Case | None]], metrics: Sequence[str]) -> str:
    """A contact sheet as an <img>: for each result the images of the benchmark, and the edit."""
    pictures, captions = [], []
    for result, case in rows:
        given = _given(case)
        given["edited"] = _edited(picture_file(folder, result["method"], result["case"]))
        pictures.append(given)
        scores = [f"{m} {number(v)}" for m in metrics if (v := value_of(result, m)) is not None]
        texts = (
            ("", "") if case is None else (case.source_description, case.edit_description or case.instruction)
        )
        notes = {"source": f"{result['case']} ({result['type']}): {texts[0]}"}
        notes["edited"] = f"{texts[1]} [{', '.join(scores)}]"
        captions.append(notes)
    names = [
        n for n in ("source", "where to edit", "edited", "true edit") if any(n in row for row in pictures)
    ]
    columns = [(name, [row.get(name, torch.ones(1, 1, 3)) for row in pictures]) for name in names]
    texts = [[row.get(name, "") for name in names] for row in captions]
    buffer = io.BytesIO()
    to_image(draw_sheet(columns, SIDE, texts)[0]).save(buffer, "JPEG", quality=88)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def _given(case: Case | None) -> dict[str, torch.Tensor]:
    """The images of the benchmark by column; none for a case that can no longer be read."""
    if case is None:
        return {}
    try:
        source, mask, target = case.source(), case.read("mask"), case.read("target_image")
    except CaseError:
        return {}
    found = {"source": to_tensor(source)[0]}
    if mask is not None:
        region = to_tensor(mask.resize(source.size))[0]
        found["where to edit"] = found["source"] * torch.lerp(torch.tensor(_DIMMED), torch.ones(1), region)
    if target is not None:
        found["true edit"] = to_tensor(target)[0]
    return found


def _edited(file: Path) -> torch.Tensor:
    try:
        with Image.open(file) as picture:
            return to_tensor(picture.convert("RGB"))[0]
    except OSError:  # the picture is gone
        return torch.ones(1, 1, 3)


def _failures(tables: Tables) -> str:
    lines = (f"{failed['method']}, {failed['case']}: {failed['error']}" for failed in tables.failures)
    items = [f"<li>{html.escape(line)}</li>" for line in lines]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _tradeoff(tables: Tables) -> str:
    points = tables.points()
    if not points:
        return (
            "<p>No metric measures how well the edits are made: the cases have no true edits and there is no "
            "CLIP (<code>--clip-vision</code>, <code>--clip</code>).</p>"
        )
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError:
        return "<p>The curves need matplotlib: <code>pip install -r lab/requirements.txt</code>.</p>"
    picture = figure.Figure(figsize=(8.4, 5), layout="constrained")
    axes = picture.subplots()
    for index, name in enumerate(dict.fromkeys(name for name, *_ in points)):
        curve = [(swept, method) for other, method, swept in points if other == name]
        _curve(axes, f"C{index % 10}", name, tables, sorted(curve, key=lambda point: point[0] or 0.0))
    for set_label, invert, metric, kind in (
        (axes.set_xlabel, axes.invert_xaxis, tables.fidelity, "keeps the picture, better right"),
        (axes.set_ylabel, axes.invert_yaxis, tables.editability, "makes the edit, better up"),
    ):
        set_label(f"{metric}: {kind}")
        if better(metric) < 0:
            invert()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _curve(
    axes: Any, colour: str, name: str, tables: Tables, points: Sequence[tuple[float | None, str]]
) -> None:
    """A sweep as a line in the order of its values, each point with both intervals."""
    ends = [
        [tables.overall[method, metric] for _, method in points]
        for metric in (tables.fidelity, tables.editability)
    ]
    x, y = ([found.mean for found in axis] for axis in ends)
    bars = [
        [[max(0.0, e.mean - e.low) for e in axis], [max(0.0, e.high - e.mean) for e in axis]] for axis in ends
    ]
    style = {"color": colour, "marker": "o", "elinewidth": 0.8, "capsize": 2}
    axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], label=name, **style)
    for (swept, _), *position in zip(points, x, y, strict=True):
        if swept is not None:
            axes.annotate(f"{swept:g}", position, textcoords="offset points", xytext=(6, 6), fontsize=9)
