"""Best, median and worst edits of a method as pictures in HTML, so that a person can judge."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from .cases import Case, CaseError
from .results import Line, picture_file
from .statistics import seconds_or_figure
from .tables import better, number

SIDE, EACH = 176, 3
_KEPT = 0.3  # of the brightness outside the mask


def chosen(lines: Sequence[Line], figure: str) -> dict[str, list[Line]]:
    """The best, median and worst results by a figure, no result twice."""
    scored = [line for line in lines if seconds_or_figure(line, figure) is not None]
    scored.sort(key=lambda line: seconds_or_figure(line, figure) * (better(figure) or 1), reverse=True)
    each = min(EACH, max(1, len(scored) // 3))
    if len(scored) < 3:
        return {"all": scored}
    middle = (len(scored) - each) // 2
    return {"best": scored[:each], "median": scored[middle : middle + each], "worst": scored[-each:]}


def sheet(
    folder: Path, lines: Sequence[Line], cases: Mapping[str, Case], figure: str, also: Sequence[str]
) -> str:
    """The chosen results as HTML; also: other figures to write under each."""
    parts = []
    for title, group in chosen(lines, figure).items():
        rows = "".join(_row(folder, line, cases.get(line["case"]), (figure, *also)) for line in group)
        parts.append(f"<h4>{title}</h4><div class=sheet>{rows}</div>")
    return "".join(parts)


def _row(folder: Path, line: Line, case: Case | None, figures: Sequence[str]) -> str:
    shown = {**_given(case), "edited": _thumbnail(picture_file(folder, line["method"], line["case"]))}
    order = ("source", "where to edit", "edited", "true edit")
    cells = "".join(
        f"<figure>{shown[name]}<figcaption>{name}</figcaption></figure>" for name in order if name in shown
    )
    scores = [
        f"{name} {number(value)}" for name in figures if (value := seconds_or_figure(line, name)) is not None
    ]
    texts = ""
    if case is not None:
        texts = f"{html.escape(case.source_description)} &rarr; <b>{html.escape(case.edit_description)}</b>"
        if not case.edit_description:
            texts = f"<b>{html.escape(case.instruction)}</b>"
    return (
        f"<div class=case><div class=pictures>{cells}</div><p>{texts}<br>"
        f"<small>{html.escape(line['case'])} ({html.escape(line['type'])}) &middot; {', '.join(scores)}"
        "</small></p></div>"
    )


def _given(case: Case | None) -> dict[str, str]:
    """What the benchmark gives, as pictures; nothing of a case that cannot be read any more."""
    if case is None:
        return {}
    try:
        source, mask, target = (case.read(role) for role in ("source_image", "mask", "target_image"))
    except CaseError:
        return {}
    shown = {"source": _embedded(source)}
    if mask is not None:
        dark = source.point([round(value * _KEPT) for value in range(256)] * 3)
        shown["where to edit"] = _embedded(Image.composite(source, dark, mask.resize(source.size)))
    if target is not None:
        shown["true edit"] = _embedded(target)
    return shown


def _thumbnail(file: Path) -> str:
    try:
        with Image.open(file) as picture:
            return _embedded(picture.convert("RGB"))
    except OSError:
        return "<div class=gone>picture missing</div>"


def _embedded(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'
