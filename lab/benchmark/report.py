"""The report of a run: CSV tables, and one HTML page that needs no other file."""

from __future__ import annotations

import html
import importlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.files import write_bytes
from .adapters import read_cases
from .contact import sheet
from .results import read_results
from .statistics import Estimate
from .tables import Point, Row, Tables, better, number

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem }
h1, h2, h3, h4 { line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td small { color: #767676; display: block }
td.up { background: #dff3e3 } td.down { background: #fbe3e0 }
.sheet { display: flex; flex-wrap: wrap; gap: 12px }
.case { border: 1px solid #ddd; padding: 6px; border-radius: 4px }
.case p { margin: 4px 2px; max-width: 720px } .pictures { display: flex; gap: 6px }
figure { margin: 0 } figure img { display: block }
figcaption { font-size: 12px; color: #666; text-align: center }
.gone { width: 120px; color: #a00 } svg { max-width: 100%; height: auto }
"""


def write_report(folder: Path, rank: str | None = None) -> Tables:
    """Write `tables/*.csv` and `report.html` into a run's folder; returns the tables.

    rank: the figure that orders the contact sheet. Raises ValueError if there are no results, no such figure,
    or the benchmark is not where it was.
    """
    lines = read_results(folder)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    where = run["benchmark"]
    data = Path(where["folder"]) if where["folder"] else None
    cases = {case.id: case for case in read_cases(where["layout"], data, where["split"])}
    tables = Tables(lines)
    figure = tables.ranked_by(rank)
    tables.write(folder / "tables")
    parts = [
        f"<h1>Edit benchmark: {html.escape(where['layout'])}</h1>",
        _summary(tables, run),
        _section("All cases", _overall(tables)),
        _section("Editability against fidelity", _tradeoff(tables)),
        _section("Compared on the same cases", _comparison(tables)),
        _section("Best, median and worst", _contact(folder, tables, cases, figure)),
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
    cases = len({line["case"] for line in tables.lines})
    text = (
        f"<p>{cases} cases of {html.escape(where['folder'] or where['layout'])}, "
        f"{len(tables.methods)} methods, {tables.failed} failed edits. A cell is the mean over the cases, "
        "below it the 95% interval by bootstrap over cases. An arrow says which way is better; figures "
        "without <code>target_</code> compare with the source, those with it with the true edit. Every "
        "figure is in <code>tables/</code>.</p>"
    )
    missing = [f"<li><code>{name}</code>: {html.escape(why)}</li>" for name, why in run["missing"].items()]
    return text + (f"<p>Empty columns:</p><ul>{''.join(missing)}</ul>" if missing else "")


def _cell(found: Estimate | None, mark: str = "") -> str:
    if found is None or not found.cases:
        return "<td>-</td>"
    ends = "" if math.isnan(found.low) else f"{number(found.low)} &hellip; {number(found.high)}"
    return f"<td{mark}>{number(found.mean)}<small>{ends}</small></td>"


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in ("", *heads))
    body = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>" for name, cells in rows)
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _head(figure: str) -> str:
    return f"{figure} {('&darr;', '', '&uarr;')[better(figure) + 1]}"


def _found(rows: Sequence[Row]) -> dict[tuple[str, str, str], Estimate]:
    return {(row.method, row.group, row.figure): row.estimate for row in rows}


def _overall(tables: Tables) -> str:
    found = _found(tables.overall)
    rows = [
        (method, [_cell(found.get((method, "", figure))) for figure in tables.shown()])
        for method in tables.methods
    ]
    return _table([_head(figure) for figure in tables.shown()], rows)


def _by_type(tables: Tables) -> str:
    found = _found(tables.by_type)
    parts = []
    for figure in tables.shown():
        if figure not in tables.figures:
            continue
        rows = [
            (method, [_cell(found.get((method, kind, figure))) for kind in tables.types])
            for method in tables.methods
        ]
        parts.append(f"<h3>{_head(figure)}</h3>" + _table([html.escape(kind) for kind in tables.types], rows))
    return "".join(parts)


def _comparison(tables: Tables) -> str:
    if len(tables.methods) < 2:
        return ""
    first = tables.methods[0]
    found = _found(tables.comparison)
    rows = []
    for method in tables.methods[1:]:
        cells = []
        for figure in tables.shown():
            difference = found.get((method, first, figure))
            cells.append(_cell(difference, _mark(difference, figure)))
        rows.append((method, cells))
    text = (
        f"<p>Each method less <b>{html.escape(first)}</b>, case by case. Green is better and red is worse "
        "where the interval does not hold 0.</p>"
    )
    return text + _table([_head(figure) for figure in tables.shown()], rows)


def _mark(found: Estimate | None, figure: str) -> str:
    if found is None or math.isnan(found.low) or found.low <= 0 <= found.high:
        return ""
    return " class=up" if found.mean * better(figure) > 0 else " class=down"


def _contact(folder: Path, tables: Tables, cases: Mapping[str, Any], figure: str) -> str:
    also = [name for name in (tables.editability, tables.fidelity) if name not in (None, figure)]
    parts = [f"<p>Ordered by <code>{figure}</code>.</p>"]
    parts += [
        f"<h3>{html.escape(method)}</h3>{sheet(folder, tables.of(method), cases, figure, also)}"
        for method in tables.methods
        if tables.of(method)
    ]
    return "".join(parts)


def _failures(tables: Tables) -> str:
    items = [
        f"<li>{html.escape(line['method'])}, {html.escape(line['case'])}: {html.escape(line['error'])}</li>"
        for line in tables.errors
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _tradeoff(tables: Tables) -> str:
    if not tables.points:
        return (
            "<p>No figure says how well the edits are made: the cases have no true edits and there is no "
            "CLIP (<code>--clip-vision</code>, <code>--clip</code>).</p>"
        )
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return "<p>The curves need matplotlib: <code>pip install matplotlib</code>.</p>"
    picture = figures.Figure(figsize=(8.4, 5), layout="constrained")
    axes = picture.subplots()
    for number_, name in enumerate(dict.fromkeys(point.name for point in tables.points)):
        _curve(axes, f"C{number_ % 10}", name, [point for point in tables.points if point.name == name])
    for set_label, set_limits, figure, kind in (
        (axes.set_xlabel, axes.invert_xaxis, tables.fidelity, "keeps the picture"),
        (axes.set_ylabel, axes.invert_yaxis, tables.editability, "makes the edit"),
    ):
        set_label(f"{figure}: {kind}, better {'right' if kind.startswith('keeps') else 'up'}")
        if better(figure) < 0:
            set_limits()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _curve(axes: Any, colour: str, name: str, points: Sequence[Point]) -> None:
    """A sweep as a line in the order of its values, each with both its intervals."""
    points = sorted(points, key=lambda point: point.swept or 0.0)
    x, y = [p.fidelity.mean for p in points], [p.editability.mean for p in points]
    bars = [
        [[max(0.0, e.mean - e.low) for e in ends], [max(0.0, e.high - e.mean) for e in ends]]
        for ends in ([p.fidelity for p in points], [p.editability for p in points])
    ]
    axes.errorbar(
        x, y, xerr=bars[0], yerr=bars[1], color=colour, marker="o", label=name, elinewidth=0.8, capsize=2
    )
    for point, place in zip(points, zip(x, y, strict=True), strict=True):
        if point.swept is not None:
            axes.annotate(f"{point.swept:g}", place, textcoords="offset points", xytext=(6, 6), fontsize=9)
