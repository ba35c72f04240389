"""EER against scikit-learn's ROC; MTWV against worked examples and a search over all thresholds; edge cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from evaluate.metrics import FALSE_ALARM_WEIGHT, equal_error_rate, max_term_weighted_value

# Few values, so that scores tie often.
trials = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda some: len({target for _, target in some}) == 2
)


def scikit_learns(scores: list[float], targets: list[bool]) -> float:
    """EER of the reference toolkit: scikit-learn's ROC, linear between its points, crossed with miss = false alarm."""
    false_alarms, hits, _ = roc_curve(targets, scores)
    return 100 * brentq(lambda x: 1 - x - interp1d(false_alarms, hits)(x), 0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(trials)
def test_equal_error_rate_is_where_scikit_learns_roc_crosses(some: list[tuple[int, bool]]) -> None:
    scores, targets = [float(score) for score, _ in some], [target for _, target in some]
    false_alarms, hits, _ = roc_curve(targets, scores, drop_intermediate=False)
    rate = equal_error_rate(scores, targets).value / 100
    # On a vertical stretch of the ROC interpolation has several values: ours lies between its ends.
    before, after = np.searchsorted(false_alarms, [rate - 1e-9, rate + 1e-9])
    near = hits[max(0, before - 1) : after + 1]
    assert near.min() - 1e-9 <= 1 - rate <= near.max() + 1e-9
    if len(set(false_alarms)) == len(false_alarms):
        assert 100 * rate == pytest.approx(scikit_learns(scores, targets))


def test_equal_error_rate_of_many_trials_is_the_references() -> None:
    generator = np.random.default_rng(0)
    for decimals in (1, 6):  # with many ties and with none
        targets = generator.random(500) < 0.4
        scores = np.round(generator.normal(size=500) + targets, decimals)
        assert equal_error_rate(scores, targets).value == pytest.approx(scikit_learns(scores, targets), abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "targets", "rate"),
    [
        ([3, 2, 1, 0], [1, 1, 0, 0], 0),
        ([3, 2, 1, 0], [0, 0, 1, 1], 100),
        ([1, 1, 1, 1], [1, 0, 1, 0], 50),  # one score for all: half way along the diagonal
        ([4, 3, 2, 1], [1, 0, 1, 0], 50),
        ([2, 1, 1, 0], [1, 1, 0, 0], 25),  # on the slope from (false alarms 0, misses 1/2) to (1/2, 0)
    ],
)
def test_equal_error_rate_by_hand(scores: list[float], targets: list[int], rate: float) -> None:
    assert equal_error_rate(scores, targets).value == pytest.approx(rate)


def test_equal_error_rate_needs_both_classes_and_finite_scores() -> None:
    for targets in ([1, 1], [0, 0]):
        with pytest.raises(ValueError, match="targets and impostors"):
            equal_error_rate([1, 2], targets)
    with pytest.raises(ValueError, match="not finite"):
        equal_error_rate([1, float("nan")], [1, 0])


def searched(scores_QD: np.ndarray, holds_QD: np.ndarray, num_documents: int, num_queries: int) -> float:
    """MTWV by its definition, over every threshold and query."""
    best = 0.0
    for threshold in np.unique(scores_QD):
        values = []
        for scores_D, holds_D in zip(scores_QD, holds_QD, strict=True):
            if holds_D.any():
                found = scores_D >= threshold
                miss = (holds_D & ~found).sum() / holds_D.sum()
                alarm = (found & ~holds_D).sum() / (num_documents - holds_D.sum())
                values.append(1 - miss - FALSE_ALARM_WEIGHT * alarm)
        best = max(best, sum(values) / num_queries)
    return 100 * best


def test_the_weight_of_a_false_alarm_is_quessts() -> None:
    # The scoring tool is given the prior 0.0741289, which includes both costs.
    assert pytest.approx(0.0741289, abs=1e-7) == 1 / (1 + FALSE_ALARM_WEIGHT)


def test_max_term_weighted_value_equals_a_search_over_thresholds() -> None:
    generator = np.random.default_rng(1)
    for decimals in (0, 1, 6):
        holds = generator.random((6, 40)) < 0.1
        holds[:, 7], holds[2] = True, False
        scores = np.round(generator.normal(size=holds.shape) + 3 * holds, decimals)
        assert max_term_weighted_value(scores, holds).value == pytest.approx(searched(scores, holds, 40, 5))
        wider = max_term_weighted_value(
            scores, holds, num_holding_Q=holds.sum(1), num_documents=400, num_queries=20
        ).value
        assert wider == pytest.approx(searched(scores, holds, 400, 20))


def test_max_term_weighted_value_by_hand() -> None:
    holds = np.zeros((2, 101), dtype=bool)
    holds[0, 0] = holds[1, 1] = True
    scores = np.zeros((2, 101))
    assert max_term_weighted_value(scores, holds).value == 0  # accepting everything is worse than nothing
    scores[0, 0] = scores[1, 1] = 2
    assert max_term_weighted_value(scores, holds).value == pytest.approx(100)
    scores[0, 5] = 3  # one false alarm of a hundred, for one of two queries
    assert max_term_weighted_value(scores, holds).value == pytest.approx(100 * (1 - FALSE_ALARM_WEIGHT / 100 / 2))
    scores[0, 6:40] = 3  # too many false alarms: accepting nothing of that query is better
    assert max_term_weighted_value(scores, holds).value == 0
    scores[1, 1] = 4
    assert max_term_weighted_value(scores, holds).value == pytest.approx(50)


def test_a_document_of_another_language_that_holds_the_query_counts_as_missed() -> None:
    assert max_term_weighted_value([[2.0, 0.0]], [[True, False]], num_holding_Q=[4]).value == pytest.approx(25)


def test_queries_that_no_document_holds_are_left_out() -> None:
    scores = np.array([[2.0, 1.0, 0.0], [9.0, 9.0, 9.0]])
    holds = np.array([[True, False, False], [False, False, False]])
    assert max_term_weighted_value(scores, holds).value == pytest.approx(100)
    with pytest.raises(ValueError, match="some document holds"):
        max_term_weighted_value(scores[1:], holds[1:])


def test_a_query_that_every_document_holds_has_no_false_alarms() -> None:
    assert max_term_weighted_value([[2.0, 1.0]], [[True, True]]).value == pytest.approx(100)
