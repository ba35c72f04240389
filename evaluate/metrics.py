"""SUPERB's metrics, all in percent: accuracy, error rates, slot metrics, equal error rate, term weighted value.

An error rate is the sum of edits over the sum of reference lengths in the corpus, never a mean of rates per utterance.
An empty hypothesis thus costs its whole reference, and every token against an empty reference is an insertion.

Each returns a `Metric`, which also yields the bootstrap interval of a test score.

Shapes: U utterances, N trials, Q queries, D documents.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.bootstrap import Counts, Metric, rate

Slots = Sequence[tuple[str, str]]  # (type, value) of an utterance's slots, in order

# (cost of a false alarm / cost of a miss) x (1 / prior - 1) = 12.49: a miss costs 100 false alarms, and one document in
# 1250 holds a query. QUESST's scoring tool states it as the prior 0.0741 = 0.08 / (0.08 + 0.9992). Term weighted value:
# Fiscus et al., "Results of the 2006 spoken term detection evaluation", SSCS 2007.
FALSE_ALARM_WEIGHT = (1 / 0.0008 - 1) / 100


def accuracy(predicted: Sequence[object], actual: Sequence[object]) -> Metric:
    """Return the percentage of equal pairs. Raises ValueError for different lengths and for none."""
    if not actual:
        raise ValueError("accuracy over no examples is not defined")
    return rate([a == b for a, b in zip(predicted, actual, strict=True)])


def token_error_rate(hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> Metric:
    """Return 100 x edits (substitutions, insertions, deletions) / reference tokens, over the corpus.

    Raises ValueError for different lengths, and if no reference has a token: the rate is then not defined.
    """
    from rapidfuzz.distance import Levenshtein  # late: heads train without it

    edits_U = [Levenshtein.distance(h, r) for h, r in zip(hypotheses, references, strict=True)]
    lengths_U = [len(reference) for reference in references]
    if not sum(lengths_U):
        raise ValueError("an error rate over references without a token is not defined")
    return rate(edits_U, lengths_U)


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> Metric:
    """Return the WER in percent, in upper case as the reference does. White space separates words."""
    return token_error_rate([h.upper().split() for h in hypotheses], [r.upper().split() for r in references])


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> Metric:
    """Return the CER in percent, in upper case as the reference does; a space between words is a character."""
    return token_error_rate([h.upper() for h in hypotheses], [r.upper() for r in references])


def slot_type_f1(hypotheses: Sequence[Slots], references: Sequence[Slots]) -> Metric:
    """Return the F1 in percent over the set of slot types of an utterance, as a mean over utterances.

    An utterance without slots on both sides counts 100, without slots on one side 0. Raises ValueError for different
    lengths and for none.
    """
    if not references:
        raise ValueError("slot-type F1 over no utterance is not defined")
    scores_U = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        found, wanted = ({kind for kind, _ in slots} for slots in (hypothesis, reference))
        # F1 of two sets: 2 |A and B| / (|A| + |B|)
        scores_U.append(2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0)
    return rate(scores_U)


def slot_value_cer(hypotheses: Sequence[Slots], references: Sequence[Slots]) -> Metric:
    """Return 100 x character edits / reference characters over all reference slots of the corpus.

    Each reference value is compared with the hypothesis's closest value of the same type, or with the empty string if
    there is none. A hypothesis of a type that the reference lacks costs nothing here (F1 covers it). Raises ValueError
    for different lengths, and if no reference has a slot.
    """
    pairs_U = list(zip(hypotheses, references, strict=True))
    edits_U = [sum(_fewest_edits(hypothesis, slot) for slot in reference) for hypothesis, reference in pairs_U]
    lengths_U = [sum(len(value) for _, value in reference) for _, reference in pairs_U]
    if not sum(lengths_U):
        raise ValueError("a slot-value CER over references without a slot is not defined")
    return rate(edits_U, lengths_U)


def _fewest_edits(hypothesis: Slots, slot: tuple[str, str]) -> int:
    """Return the edits between a reference slot's value and the closest hypothesis of its type."""
    values = [value for kind, value in hypothesis if kind == slot[0]] or [""]
    from rapidfuzz.distance import Levenshtein

    return min(Levenshtein.distance(value, slot[1]) for value in values)


def equal_error_rate(scores_N: ArrayLike, targets_N: ArrayLike) -> Metric:
    """Return the EER in percent: the point of the ROC where misses equal false alarms. A unit is a trial.

    Between points the ROC is linear. Trials of the same score are accepted together. scores_N: higher is more alike;
    targets_N: 1 or 0. Raises ValueError unless there are targets and impostors, and for a score that is not finite.
    """
    scores, targets = np.asarray(scores_N, dtype=np.float64), np.asarray(targets_N, dtype=bool)
    if not np.isfinite(scores).all():
        raise ValueError("an equal error rate of scores that are not finite is not defined")
    if targets.all() or not targets.any():
        raise ValueError("an equal error rate needs targets and impostors")
    order_N = np.argsort(-scores, kind="stable")  # best score first: lowering the threshold accepts one after another
    last = np.flatnonzero(np.diff(scores[order_N], append=-np.inf))  # last trial of each score: a point of the ROC
    ordered_N = targets[order_N]

    def resampled(counts_N: Counts) -> float:
        counts = counts_N[order_N]
        if not (num_targets := counts @ ordered_N) or not (num_impostors := counts @ ~ordered_N):
            return np.nan  # a resample of one class
        # Rates after accepting nothing, and then at each point: misses fall from 1, false alarms rise from 0.
        misses = 1 - np.concatenate([[0], np.cumsum(counts * ordered_N)[last]]) / num_targets
        alarms = np.concatenate([[0], np.cumsum(counts * ~ordered_N)[last]]) / num_impostors
        after = int(np.argmax(alarms >= misses))  # first point at or past the crossing; never the first of all
        gap = alarms[after - 1 : after + 1] - misses[after - 1 : after + 1]
        share = gap[0] / (gap[0] - gap[1])  # where the gap, linear between the two points, is 0
        return float(100 * (alarms[after - 1] + share * (alarms[after] - alarms[after - 1])))

    return Metric.of(resampled, len(scores), "trials")


def max_term_weighted_value(
    scores_QD: ArrayLike,
    holds_QD: ArrayLike,
    *,
    num_holding_Q: Sequence[int] | NDArray[np.int64] | None = None,
    num_queries: int | None = None,
    num_documents: int | None = None,
) -> Metric:
    """Return the MTWV in percent: the highest term weighted value over all thresholds. A unit is a scored query.

    Term weighted value: the mean over queries of 1 - P(miss) - 12.49 P(false alarm), never below 0, the value of
    accepting nothing. A query that no document holds is left out. The scored part may be a subset of a larger search,
    as English is of QUESST's six languages: `num_holding_Q` documents hold each query, of `num_documents`, and
    `num_queries` queries are held by some document. All that was not scored counts as not found. Raises ValueError if
    no document holds any query.
    """
    scores, holds = np.asarray(scores_QD, dtype=np.float64), np.asarray(holds_QD, dtype=bool)
    holding_Q = holds.sum(1) if num_holding_Q is None else np.asarray(num_holding_Q)
    held_Q = holding_Q > 0
    scores, holds, holding_Q1 = scores[held_Q], holds[held_Q], holding_Q[held_Q, None]
    if not len(scores):
        raise ValueError("a term weighted value needs a query that some document holds")
    others_Q1 = np.maximum((holds.shape[1] if num_documents is None else num_documents) - holding_Q1, 1)
    # Accepting a pair adds 1 / (documents that hold the query) or takes 12.49 / (documents that do not); the value at a
    # threshold is the sum over accepted pairs, divided by the number of queries.
    gain_QD = np.where(holds, 1 / holding_Q1, -FALSE_ALARM_WEIGHT / others_Q1) / (num_queries or len(scores))
    order = np.argsort(-scores, axis=None, kind="stable")
    last = np.flatnonzero(np.diff(scores.flat[order], append=-np.inf))  # pairs of one score are accepted together
    gain, query = gain_QD.flat[order], order // gain_QD.shape[1]

    def resampled(counts_Q: Counts) -> float:
        return float(100 * max(0.0, np.cumsum(gain * counts_Q[query])[last].max()))

    return Metric.of(resampled, len(scores), "queries")
