"""Means over cases with bootstrap intervals, and the difference of two methods on the same cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from .results import Line

LEVEL, RESAMPLES, SEED = 0.95, 2_000, 0


@dataclass(frozen=True)
class Estimate:
    """A mean over `cases` cases with its interval; nan where there are too few cases for one."""

    mean: float
    low: float
    high: float
    cases: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its 95% interval by the percentile bootstrap (Efron 1979): the cases are resampled."""
    if not values:
        return Estimate(np.nan, np.nan, np.nan, 0)
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, np.nan, np.nan, 1)
    interval = scipy.stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(values))


def values(lines: Iterable[Line], figure: str) -> dict[str, float]:
    """A figure by case, of the lines that have it."""
    found = {line["case"]: seconds_or_figure(line, figure) for line in lines}
    return {case: value for case, value in found.items() if value is not None}


def seconds_or_figure(line: Line, figure: str) -> float | None:
    return line["seconds"] if figure == "seconds" else line["figures"].get(figure)


def difference(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate:
    """Second less first, over the cases that both have: each case is compared with itself."""
    return estimate([second[case] - first[case] for case in first if case in second])
