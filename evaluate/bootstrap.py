"""How far a test score would move on other test sets of the same kind: bootstrap intervals.

A metric hands over what it was made from (`rate`, or a `Measured` of its own), and `interval` measures it again on
resamples of the test set: as many units as there are, drawn with replacement, the whole metric anew on each, and
between the percentiles lies the interval (Efron 1979; for word error rates Bisani and Ney, ICASSP 2004). A unit is what
is drawn: an utterance, unless its metric pairs utterances. All scores of as many units see the same draws.

What the interval does not know: the head's seed, the students' seed, and that utterances of one speaker resemble each
other. At 0 and at 100% every resample agrees, and the interval is that one point.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.scorefile import Interval

LEVEL_PERCENT = 95
RESAMPLES = 1000
SEED = 0
UTTERANCES = "utterances"
Counts = NDArray[np.int64]  # (units,): how often each unit was drawn


class Measured(float):
    """A metric's value, in percent, that can be measured again on resamples of its test set.

    A plain number wherever one is wanted; arithmetic forgets where it came from.
    """

    again: Callable[[Counts], float]
    num_units: int
    units: str

    def __new__(cls, again: Callable[[Counts], float], num_units: int, units: str = UTTERANCES) -> Self:
        """again: counts (units,) -> the metric with unit u taken counts[u] times, NaN where it is not defined."""
        made = super().__new__(cls, again(np.ones(num_units, dtype=np.int64)))
        made.again, made.num_units, made.units = again, num_units, units
        return made


def rate(numerators_U: ArrayLike, denominators_U: ArrayLike | None = None, *, units: str = UTTERANCES) -> Measured:
    """100 x sum of numerators / sum of denominators, one of each a unit; without denominators the mean.

    Hits for an accuracy; edits and reference lengths for an error rate; missed, false and confused time and spoken time
    for a diarisation error rate. Raises ValueError where the denominators sum to 0.
    """
    over = np.asarray(numerators_U, dtype=np.float64)
    under = np.ones_like(over) if denominators_U is None else np.asarray(denominators_U, dtype=np.float64)
    if over.shape != under.shape or over.ndim != 1:
        raise ValueError(f"{over.shape} numerators and {under.shape} denominators: one of each a unit is needed")
    if not under.sum():
        raise ValueError("a rate whose denominators sum to 0 is not defined")

    def again(counts_U: Counts) -> float:
        total = float(counts_U @ under)
        return 100 * float(counts_U @ over) / total if total else np.nan

    return Measured(again, len(over), units)


def mean_of(parts: Sequence[Measured]) -> Measured:
    """The mean of several metrics with units of their own, such as the folds of a cross-validation."""
    ends = np.cumsum([part.num_units for part in parts])

    def again(counts_U: Counts) -> float:
        return float(np.mean([part.again(own) for part, own in zip(parts, np.split(counts_U, ends[:-1]), strict=True)]))

    return Measured(again, int(ends[-1]), parts[0].units)


def interval(measured: Measured) -> tuple[float, float]:
    """The LEVEL_PERCENT interval, low and high, in percent. Resamples without a defined metric are left out."""
    generator = np.random.default_rng(SEED)
    num = measured.num_units
    values = [
        measured.again(np.bincount(generator.integers(num, size=num), minlength=num).astype(np.int64))
        for _ in range(RESAMPLES)
    ]
    outside = (100 - LEVEL_PERCENT) / 2
    low, high = np.nanpercentile(values, [outside, 100 - outside])
    return float(low), float(high)


def intervals_of(test: Mapping[str, float], metric: str) -> Interval:
    """Return the intervals of a score file: of `metric` and of the other test metrics that have one."""
    found = {name: interval(value) for name, value in test.items() if isinstance(value, Measured)}
    chosen = test[metric]
    return Interval(
        test=found.pop(metric, None),
        also=found,
        of=chosen.units if isinstance(chosen, Measured) else None,
        level_percent=LEVEL_PERCENT,
        resamples=RESAMPLES,
        seed=SEED,
    )
