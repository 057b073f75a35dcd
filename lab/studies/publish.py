"""Measures a study's rows, and writes its page from stored ones; the command line of the studies."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils

from ..benchmark.cases import first_of_each_type
from ..benchmark.layouts import read_cases
from ..output import DOCS, write_json, write_page
from .claims import Aim, Claim, aim_table, claim_table
from .rows import ROWS
from .studio import Studio
from .study import Study, Tables

FIRST = "methods"  # the main table


@dataclass(frozen=True, eq=False)
class Plan:
    """A study.

    name: of its page.
    columns: of the page's tables.
    tables: the methods of each table by label, by the name that the page gives it; FIRST is the main one.
    metrics: the numbers for machines.
    texts: the page's values beside the tables, by name.
    search: the tables of the search for settings, on the first `per_type` tuning cases of each type.
    claims, aims: what the page compares with the paper, and what the methods should reach.
    shown: how many methods the contact sheet shows.
    compared: columns of the tables of differences.
    layout: of the cases.
    """

    name: str
    columns: Sequence[str]
    tables: Callable[[], dict[str, Any]]
    metrics: Callable[[Study, Tables], dict[str, float]]
    texts: Callable[[Study, Tables, Mapping[str, float]], dict[str, Any]]
    search: Callable[[], dict[str, Any]]
    claims: Callable[[Study, Tables], list[Claim]]
    aims: Callable[[Study, Tables], list[Aim]]
    shown: int
    per_type: int = 60
    compared: Sequence[str] = ("success", "target_psnr", "psnr_outside", "structure")
    layout: str = "tiny-studio"


def measure(
    work: Sequence[tuple[Study, Tables]],
    anew: bool = False,
    per_type: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Measure what is not stored, or only of earlier weights, settings or code: the main tables first.

    anew: measure everything.
    per_type: only the first cases of each edit type.
    shard: which of how many processes this is; each measures rows of its own.
    """
    parts = [(study, name, rows) for study, tables in work for name, rows in tables.items()]
    parts.sort(key=lambda part: part[1] != FIRST)
    known = {
        (id(study), method.label): (study, method) for study, _, rows in parts for method in rows.values()
    }
    number, count = shard
    chosen = list(known.values())[number::count]
    if anew:
        for study, method in chosen:
            study.store.give_up(method)
    for study, method in chosen:
        study.run([method], per_type)


def publish(study: Study, tuning: Study, plan: Plan, docs: Path = DOCS) -> tuple[dict[str, float], str]:
    """Write a study's page from its stored rows; returns its metrics and the page."""
    tables, search = plan.tables(), plan.search()
    metrics = plan.metrics(study, tables)
    values: dict[str, Any] = {"cases": len(study.cases), "tuning": len(tuning.cases)}
    for name, rows in tables.items():
        values[name] = study.table(rows, plan.columns)
        values[f"{name}_differences"] = study.differences(rows, plan.compared)
    for name, rows in search.items():
        values[name] = tuning.table(rows, plan.columns)
        values[f"{name}_differences"] = tuning.differences(rows, plan.compared)
    values["claims"] = claim_table(study, plan.claims(study, tables))
    values["aims"] = aim_table(plan.aims(study, tables))
    values["measured"] = study.summary(tables)
    values |= plan.texts(study, tables, metrics)
    template = Path(__file__).with_name(f"{plan.name}_page.md")
    return metrics, write_page(template, docs / f"{plan.name}.md", values)


def draw(study: Study, plan: Plan, docs: Path = DOCS) -> None:
    """Draw a study's contact sheet, which makes the shown images."""
    rows = dict(list(plan.tables()[FIRST].items())[: plan.shown])
    study.draw(rows, docs / "pictures" / f"{plan.name}.jpg")


def studies(plans: Sequence[Plan], tiny: Studio, folder: Path = ROWS) -> list[tuple[Study, Study]]:
    """For each plan the study on its cases, shared by plans of the same cases, and that on tuning cases."""
    found: dict[tuple[str, int | None], Study] = {}
    for plan in plans:
        alike = [other for other in plans if other.layout == plan.layout]
        if (plan.layout, None) not in found:
            tables = {other.name: other.tables() for other in alike}
            cases = read_cases(plan.layout, None, "test")
            found[plan.layout, None] = Study(tiny, cases, "test", tables, folder)
        if (plan.layout, plan.per_type) not in found:
            tables = {other.name: other.search() for other in alike if other.per_type == plan.per_type}
            cases = first_of_each_type(read_cases(plan.layout, None, "tuning"), plan.per_type)
            found[plan.layout, plan.per_type] = Study(tiny, cases, "tuning", tables, folder)
    return [(found[plan.layout, None], found[plan.layout, plan.per_type]) for plan in plans]


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The options of all commands that write pages from stored rows."""
    found = argparse.ArgumentParser(prog=prog, description=description)
    add = found.add_argument
    add("--measure", action="store_true", help="first measure what is missing, or of earlier weights or code")
    add("--anew", action="store_true", help="first measure everything again")
    add("--per-type", type=int, metavar="N", help="measure only the first N cases of each edit type")
    add("--json", type=Path, help="write the metrics as one flat JSON object")
    return found


def prepare(
    plans: Sequence[Plan],
    pairs: Sequence[tuple[Study, Study]],
    args: argparse.Namespace,
    docs: Path = DOCS,
) -> None:
    """Measure and draw as the options say, or compare the code's images with the stored rows' probes."""
    if args.measure or args.anew:
        held = [(study, plan.tables()) for plan, (study, _) in zip(plans, pairs, strict=True)]
        tuned = [(tuning, plan.search()) for plan, (_, tuning) in zip(plans, pairs, strict=True)]
        measure(held, args.anew, args.per_type)
        measure(tuned, args.anew, args.per_type)
        for plan, (study, _) in zip(plans, pairs, strict=True):
            draw(study, plan, docs)
        return
    for plan, (study, _) in zip(plans, pairs, strict=True):
        methods = {method.label: method for rows in plan.tables().values() for method in rows.values()}
        for method in methods.values():
            if study.store.find(method):
                study.check(method)


def finish(text: str, metrics: Mapping[str, float], json: Path | None) -> None:
    """Print the page and the metrics, and write the metrics as JSON; null for what is not measured."""
    print(text)
    for name, value in metrics.items():
        print(f"{name:<40}{value:.3f}")
    write_json(json, {name: None if math.isnan(value) else value for name, value in metrics.items()})


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1, such as 0/2")
    return int(number), int(count)


def command(prog: str, description: str | None, plan: Plan, tuned: Sequence[Plan] = ()) -> None:
    """The command line of a study. tuned: other studies whose search belongs to it."""
    options = parser(prog, description)
    options.add_argument(
        "--tune", action="store_true", help="measure and print the search on the tuning cases only"
    )
    options.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="with --tune: as process I (from 0) of N"
    )
    args = options.parse_args()
    comfy.utils.set_progress_bar_enabled(False)
    tiny = Studio.load()
    if args.tune:
        plans = [*tuned, plan]
        searches = [(tuning, one) for one, (_, tuning) in zip(plans, studies(plans, tiny), strict=True)]
        measure([(tuning, one.search()) for tuning, one in searches], args.anew, args.per_type, args.shard)
        for tuning, one in searches:
            for rows in one.search().values():
                print(tuning.table(rows, one.columns), end="\n\n")
                print(tuning.differences(rows, one.compared), end="\n\n")
        return
    pairs = studies([plan], tiny)
    prepare([plan], pairs, args)
    metrics, text = publish(*pairs[0], plan)
    finish(text, metrics, args.json)
