"""Means over cases with bootstrap intervals, and the difference of two methods on the same cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from .results import Result

LEVEL, RESAMPLES, SEED = 0.95, 2_000, 0


@dataclass(frozen=True)
class Estimate:
    """A mean over `cases` cases with its 95% interval; nan if there are too few cases."""

    mean: float
    low: float
    high: float
    cases: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its 95% interval by the percentile bootstrap over the cases (Efron 1979)."""
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


def values(results: Iterable[Result], metric: str) -> dict[str, float]:
    """A metric, or `seconds`, by case, of the results that have it."""
    found = {result["case"]: value_of(result, metric) for result in results}
    return {case: value for case, value in found.items() if value is not None}


def value_of(result: Result, metric: str) -> float | None:
    return result["seconds"] if metric == "seconds" else result["metrics"].get(metric)


def mean(results: Iterable[Result], metric: str) -> float:
    """The mean of a metric over the results that have it; nan if none has."""
    found = values(results, metric)
    return sum(found.values()) / len(found) if found else np.nan


def difference(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate:
    """Second minus first, case by case, over the cases that both have."""
    return estimate([second[case] - first[case] for case in first if case in second])
