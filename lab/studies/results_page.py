"""`python dev.py report`: the studies' pages, docs/results.md with all methods, and docs/claims.md.

All are written from stored rows. `--measure` first measures what is missing, or of earlier weights, settings
or code: the main tables first. It can be stopped and continued. `--anew` first measures everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.utils

from ..output import DOCS, markdown, write_page
from . import bridge_study, two_objects, unify_study
from .claims import claim_table
from .publish import FIRST, Plan, finish, parser, prepare, publish, studies
from .studio import Studio
from .study import FRACTIONS, Rows, Study

PLANS = (bridge_study.PLAN, unify_study.PLAN, two_objects.PLAN)


def side_by_side(plans: Sequence[Plan]) -> Rows:
    """The methods of the studies by label. Raises ValueError if two different methods have one label."""
    rows: dict = {}
    for plan in plans:
        for label, method in plan.tables()[FIRST].items():
            other = rows.setdefault(label, method)
            if other.digest != method.digest:
                raise ValueError(f"{label!r} is two methods: {other.settings} and {method.settings}")
    return rows


def metric_table(metrics: Mapping[str, float]) -> str:
    """A study's metrics as a Markdown table: fractions of the cases in percent, and decibels."""
    rows = [
        (f"`{name}`", f"{value:.1%}" if name.startswith(FRACTIONS) else f"{value:.2f}")
        for name, value in metrics.items()
        if value == value
    ]
    return markdown(("metric", ""), rows)


def write(
    pairs: Sequence[tuple[Study, Study]], plans: Sequence[Plan], docs: Path = DOCS
) -> tuple[dict[str, float], str]:
    """Write all pages from stored rows; returns the metrics as `STUDY.METRIC`, and docs/results.md."""
    found, parts, claims = {}, [], []
    for plan, (study, tuning) in zip(plans, pairs, strict=True):
        metrics, text = publish(study, tuning, plan, docs)
        title = f"## [{text.splitlines()[0].removeprefix('# ')}]({plan.name}.md)"
        parts.append(f"{title}\n\n{metric_table(metrics)}")
        claims.append(f"{title}\n\n{claim_table(study, plan.claims(study, plan.tables()))}")
        found |= {f"{plan.name}.{name}": value for name, value in metrics.items()}
    study, methods = pairs[0][0], side_by_side([p for p in plans if p.layout == plans[0].layout])
    values = {
        "cases": len(study.cases),
        "methods": study.table(methods),
        "measured": study.summary({FIRST: methods}),
        "metrics": "\n\n".join(parts),
        "claims": "\n\n".join(claims),
    }
    here = Path(__file__)
    write_page(here.with_name("claims_page.md"), docs / "claims.md", values)
    return found, write_page(here.with_name("results_page.md"), docs / "results.md", values)


def main() -> None:
    args = parser("dev.py report", __doc__).parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    pairs = studies(PLANS, Studio.load())
    prepare(PLANS, pairs, args)
    metrics, text = write(pairs, PLANS)
    finish(text, metrics, args.json)


if __name__ == "__main__":
    main()
