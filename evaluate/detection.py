"""Metrics of detection: the equal error rate of trials, and the maximum term weighted value of spoken queries.

Shapes: N trials, Q queries, D documents.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.bootstrap import Counts, Measured

# QUESST's scoring tool is given the prior 0.0741 = 0.08 / (0.08 + 0.9992): a miss costs 100 false alarms, and one
# document in 1250 holds a query. Term weighted value: Fiscus et al., SIGIR 2007 staging on spoken content retrieval.
FALSE_ALARM_WEIGHT = (1 / 0.0008 - 1) / 100


def equal_error_rate(scores_N: ArrayLike, targets_N: ArrayLike) -> Measured:
    """EER in percent: where the ROC's misses and false alarms are equal, linear between its points. A unit is a trial.

    Trials of the same score are accepted together. scores_N: higher is more alike; targets_N: 1 or 0.
    Raises ValueError unless there are targets and impostors, and for a score that is not finite.
    """
    scores, targets = np.asarray(scores_N, dtype=np.float64), np.asarray(targets_N, dtype=bool)
    if not np.isfinite(scores).all():
        raise ValueError("an equal error rate of scores that are not finite is not defined")
    if targets.all() or not targets.any():
        raise ValueError("an equal error rate needs targets and impostors")
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last trial of each score
    ordered = targets[order]

    def again(counts_N: Counts) -> float:
        counts = counts_N[order]
        if not (num_targets := counts @ ordered) or not (num_impostors := counts @ ~ordered):
            return np.nan  # a resample of one class
        misses = 1 - np.concatenate([[0], np.cumsum(counts * ordered)[last]]) / num_targets
        alarms = np.concatenate([[0], np.cumsum(counts * ~ordered)[last]]) / num_impostors
        after = int(np.argmax(alarms >= misses))
        gap = alarms[after - 1 : after + 1] - misses[after - 1 : after + 1]
        share = gap[0] / (gap[0] - gap[1])
        return float(100 * (alarms[after - 1] + share * (alarms[after] - alarms[after - 1])))

    return Measured(again, len(scores), "trials")


def max_term_weighted_value(
    scores_QD: ArrayLike,
    holds_QD: ArrayLike,
    *,
    num_holding_Q: Sequence[int] | NDArray[np.int64] | None = None,
    num_queries: int | None = None,
    num_documents: int | None = None,
) -> Measured:
    """MTWV in percent: the highest mean over queries of 1 - P(miss) - 12.49 P(false alarm), over all thresholds.

    A query that no document holds is left out. What was scored may be a part of a larger search, as English is of
    QUESST's six languages: `num_holding_Q` documents hold each query, of `num_documents`, and there are `num_queries`
    that some document holds. All that was not scored counts as not found. Never below 0: nothing need be accepted.
    A unit is a query that was scored. Raises ValueError where no query is held by a document.
    """
    scores, holds = np.asarray(scores_QD, dtype=np.float64), np.asarray(holds_QD, dtype=bool)
    holding = holds.sum(1) if num_holding_Q is None else np.asarray(num_holding_Q)
    scores, holds, holding = scores[holding > 0], holds[holding > 0], holding[holding > 0, None]
    if not len(scores):
        raise ValueError("a term weighted value needs a query that some document holds")
    others = np.maximum((holds.shape[1] if num_documents is None else num_documents) - holding, 1)
    gain_QD = np.where(holds, 1 / holding, -FALSE_ALARM_WEIGHT / others) / (num_queries or len(scores))
    order = np.argsort(-scores, axis=None, kind="stable")
    last = np.flatnonzero(np.diff(scores.flat[order], append=-np.inf))
    gain, query = gain_QD.flat[order], order // gain_QD.shape[1]
    return Measured(
        lambda counts_Q: float(100 * max(0.0, np.cumsum(gain * counts_Q[query])[last].max())), len(scores), "queries"
    )
