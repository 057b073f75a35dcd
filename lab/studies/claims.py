"""What the papers claim, and whether the stored results show it, by the rule in claims_page.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..benchmark.tables import better
from ..output import markdown
from .rows import MISSING
from .study import COLUMNS, Row, Study, shown, unit

# Metrics against the source that no other table has.
NAMES = {name: f"{name.upper()} to the source" for name in ("l1", "l2", "lpips", "psnr", "ssim")}
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be shown here"


@dataclass(frozen=True)
class Comparison:
    """`first` is better than `second` by a metric, or worse by at most `margin` if there is one."""

    metric: str
    first: Row
    second: Row
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    text: what the paper says.
    comparisons: none if nothing here can show it.
    reason: why not, then.
    """

    text: str
    comparisons: tuple[Comparison, ...]
    reason: str = ""


@dataclass(frozen=True)
class Aim:
    """What a method should reach. unit: "%" or "dB"."""

    text: str
    found: float
    wanted: float
    unit: str = "%"


def judge(study: Study, comparison: Comparison) -> tuple[str, str, int]:
    """Verdict, figure and number of cases of one comparison."""
    (label, first), (other, second) = comparison.first, comparison.second
    states = [study.store.state(method) for method in (first, second)]
    name, _ = COLUMNS.get(comparison.metric, (NAMES.get(comparison.metric, comparison.metric), ""))
    what = f"{name}: {label} against {other}"
    if MISSING in states:
        return MISSING, what, 0
    found = study.difference(first, second, comparison.metric)
    if not found.cases:
        return OPEN, f"{what}: its network is not here", 0
    ends = sorted(better(comparison.metric) * end for end in (found.low, found.high))
    verdict = HOLDS if ends[0] > -comparison.margin else FAILS if ends[1] < -comparison.margin else OPEN
    notes = sorted({state for state in states if state})
    scale, _ = unit(comparison.metric)
    margin = f", margin {scale * comparison.margin:g}" if comparison.margin else ""
    figure = f"{what}{margin}: {shown(found, comparison.metric)}{''.join(f' [{note}]' for note in notes)}"
    return verdict, figure, found.cases


def verdict_of(verdicts: Sequence[str]) -> str:
    """The verdict of a claim from those of its comparisons."""
    if FAILS in verdicts:
        return FAILS
    alike = set(verdicts) in ({HOLDS}, {MISSING})
    return verdicts[0] if alike else OPEN


def claim_table(study: Study, claims: Iterable[Claim]) -> str:
    """A Markdown table of claims with verdict, figures and number of cases."""
    lines = []
    for claim in claims:
        judged = [judge(study, comparison) for comparison in claim.comparisons]
        verdict = verdict_of([one for one, _, _ in judged])
        single = len(judged) == 1
        figures = [figure if single else f"{figure}: {one}" for one, figure, _ in judged] or [claim.reason]
        cases = max((count for _, _, count in judged), default=0)
        lines.append([claim.text, f"**{verdict}**", "<br>".join(figures), str(cases) if cases else ""])
    return markdown(["claim", "here", "difference (95% interval)", "cases"], lines)


def aim_table(aims: Iterable[Aim]) -> str:
    """A Markdown table of aims and whether they are reached."""
    lines = []
    for aim in aims:
        form = "{:.1%}" if aim.unit == "%" else "{:.2f} " + aim.unit
        known = not math.isnan(aim.found + aim.wanted)
        verdict = ("yes" if aim.found >= aim.wanted else "no") if known else ""
        wanted = "" if math.isnan(aim.wanted) else form.format(aim.wanted)
        lines.append([aim.text, wanted, form.format(aim.found) if known else "", verdict])
    return markdown(["aim", "at least", "found", "reached"], lines)
