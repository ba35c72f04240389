"""Metrics with bootstrap intervals: the variation of a test score over other test sets of the same kind.

A `Metric` holds its value and a function that computes it again on a resample of the test set. `interval` draws
resamples of as many units as the test set has, with replacement, and takes percentiles of the metric over them (Efron
1979; for word error rates Bisani and Ney, ICASSP 2004). A unit is an utterance unless the metric's `units` differ. All
metrics with the same number of units get the same draws.

A score is the mean over the heads of several seeds. Its test set's interval resamples the test set for all heads at
once: units on which heads err alike count fully. The seeds add the variance of a mean over S heads, sd^2 / S, with the
standard deviation sd of the heads' metrics (n - 1): an end at distance d from the mean moves to
sqrt(d^2 + (z sd)^2 / S), with z = 1.96 at 95%. This takes sd as known, while it is an estimate from S heads, and counts
the part of sd that comes from the test set twice.

The interval does not cover the seeds of students, nor the similarity of utterances of one speaker. At 0% and 100% all
resamples agree, and the test set's interval is a single point.

Shapes: U units of the test set.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.scorefile import Interval

LEVEL_PERCENT = 95
RESAMPLES = 1000
SEED = 0
UTTERANCES = "utterances"
Counts = NDArray[np.int64]  # (U,): number of times that each unit was drawn


@dataclass(frozen=True)
class Metric:
    """Value of a metric in percent, with its computation on resamples of the test set."""

    value: float
    resampled: Callable[[Counts], float]  # counts (U,) -> value, NaN where it is not defined
    num_units: int
    units: str

    @classmethod
    def of(cls, resampled: Callable[[Counts], float], num_units: int, units: str = UTTERANCES) -> "Metric":
        """Return the metric whose value is that of the test set itself: every unit once."""
        return cls(resampled(np.ones(num_units, dtype=np.int64)), resampled, num_units, units)

    def __float__(self) -> float:
        return self.value


Metrics = Mapping[str, Metric | float]  # by name, in percent; a plain number has no bootstrap interval


def rate(numerators_U: ArrayLike, denominators_U: ArrayLike | None = None, *, units: str = UTTERANCES) -> Metric:
    """Return 100 x sum of numerators / sum of denominators, both (U,); without denominators 100 x the mean.

    Accuracy: hits. Error rate: edits and reference lengths. Diarisation error rate: wrong seconds (missed, false and
    confused speech) and seconds of speech. Raises ValueError for different shapes and if the denominators sum to 0.
    """
    over_U = np.asarray(numerators_U, dtype=np.float64)
    under_U = np.ones_like(over_U) if denominators_U is None else np.asarray(denominators_U, dtype=np.float64)
    if over_U.shape != under_U.shape or over_U.ndim != 1:
        raise ValueError(f"{over_U.shape} numerators and {under_U.shape} denominators: expected one of each per unit")
    if not under_U.sum():
        raise ValueError("a rate whose denominators sum to 0 is not defined")

    def resampled(counts_U: Counts) -> float:
        total = float(counts_U @ under_U)
        return 100 * float(counts_U @ over_U) / total if total else np.nan

    return Metric.of(resampled, len(over_U), units)


def mean_of(parts: Sequence[Metric]) -> Metric:
    """Return the mean of metrics that each have their own units, such as cross-validation folds."""
    ends = np.cumsum([part.num_units for part in parts])  # the parts' units lie one after another

    def resampled(counts_U: Counts) -> float:
        own = zip(parts, np.split(counts_U, ends[:-1]), strict=True)
        return float(np.mean([part.resampled(counts) for part, counts in own]))

    return Metric.of(resampled, int(ends[-1]), parts[0].units)


def mean_of_heads(heads: Sequence[Metric]) -> Metric:
    """Return the mean of metrics on the same units, such as heads of several seeds."""
    first = heads[0]
    assert {head.num_units for head in heads} == {first.num_units}, "heads are measured on one test set"
    return Metric.of(lambda counts_U: fmean(head.resampled(counts_U) for head in heads), first.num_units, first.units)


def means(tests: Sequence[Metrics], mean: Callable[[Sequence[Metric]], Metric]) -> Metrics:
    """Return the mean of every metric, by `mean` where each of its values has an interval."""
    if len(tests) == 1:
        return tests[0]
    found: dict[str, Metric | float] = {}
    for name in tests[0]:
        values = [test[name] for test in tests]
        metrics = [value for value in values if isinstance(value, Metric)]
        found[name] = mean(metrics) if len(metrics) == len(values) else fmean(map(float, values))
    return found


def deviations(heads: Sequence[Metrics]) -> dict[str, float]:
    """Return the standard deviation over heads (n - 1) of every metric; empty for one head."""
    if len(heads) < 2:
        return {}
    return {name: stdev(float(head[name]) for head in heads) for name in heads[0]}


def interval(metric: Metric) -> tuple[float, float]:
    """Return the LEVEL_PERCENT interval, low and high, in percent. Resamples with an undefined metric are left out."""
    generator = np.random.default_rng(SEED)
    num = metric.num_units
    values = [
        metric.resampled(np.bincount(generator.integers(num, size=num), minlength=num).astype(np.int64))
        for _ in range(RESAMPLES)
    ]
    tail = (100 - LEVEL_PERCENT) / 2  # percent outside on each side
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def with_seeds(mean: float, ends: tuple[float, float], *, sd: float, num_heads: int) -> tuple[float, float]:
    """Widen the test set's interval of a mean over heads by the variation of the heads (see the top of this file).

    It ends at 0% and 100%, unless the test set's does not.
    """
    of_seeds = NormalDist().inv_cdf(0.5 + LEVEL_PERCENT / 200) * sd / math.sqrt(num_heads)
    low, high = (math.hypot(end - mean, of_seeds) for end in ends)
    return max(mean - low, min(0.0, ends[0])), min(mean + high, max(100.0, ends[1]))


def intervals_of(heads: Sequence[Metrics], metric: str) -> Interval:
    """Return the intervals of a score file: of `metric` and of the other test metrics that have one, over the heads."""
    test, sd = means(heads, mean_of_heads), deviations(heads)
    test_set = {name: interval(value) for name, value in test.items() if isinstance(value, Metric)}
    found = {
        name: with_seeds(float(test[name]), ends, sd=sd[name], num_heads=len(heads)) if sd else ends
        for name, ends in test_set.items()
    }
    chosen = test[metric]
    return Interval(
        test=found.pop(metric, None),
        test_set=test_set.get(metric),
        also=found,
        of=chosen.units if isinstance(chosen, Metric) else None,
        level_percent=LEVEL_PERCENT,
        resamples=RESAMPLES,
        seed=SEED,
    )
