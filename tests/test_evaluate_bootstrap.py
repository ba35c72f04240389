"""Bootstrap intervals against scipy's; resampled metrics against metrics of the drawn utterances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_curve

from evaluate.bootstrap import (
    Counts,
    Metric,
    deviations,
    interval,
    intervals_of,
    mean_of,
    mean_of_heads,
    means,
    rate,
    with_seeds,
)
from evaluate.metrics import accuracy, token_error_rate

symbols = st.lists(st.sampled_from("ABC"), max_size=6)
drawn = st.lists(
    st.tuples(symbols, st.lists(st.sampled_from("ABC"), min_size=1, max_size=6), st.integers(0, 3)), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(drawn)
def test_a_resampled_metric_is_the_metric_of_the_drawn_utterances(rows: list[tuple[list[str], list[str], int]]) -> None:
    hypotheses, references, counts = map(list, zip(*rows, strict=True))
    if not sum(counts):
        counts[0] = 1
    taken = [index for index, count in enumerate(counts) for _ in range(count)]
    rates = token_error_rate(hypotheses, references)
    drawn = token_error_rate([hypotheses[index] for index in taken], [references[index] for index in taken])
    assert rates.resampled(np.array(counts)) == drawn.value
    lengths = [len(text) for text in hypotheses], [len(text) for text in references]
    hits = accuracy(*lengths)
    drawn = accuracy(*([one[i] for i in taken] for one in lengths))
    assert hits.resampled(np.array(counts)) == pytest.approx(drawn.value)


def test_intervals_are_scipys() -> None:
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 30, 150)
    edits = generator.binomial(lengths, generator.beta(2, 6, 150))
    low, high = interval(rate(edits, lengths))
    independent = stats.bootstrap(
        (edits, lengths),
        lambda over, under, axis: 100 * over.sum(axis) / under.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=generator,
    ).confidence_interval
    width = independent.high - independent.low
    assert low == pytest.approx(independent.low, abs=0.06 * width)
    assert high == pytest.approx(independent.high, abs=0.06 * width)


def test_an_accuracys_interval_is_as_wide_as_the_binomial_one() -> None:
    low, high = interval(accuracy([1] * 340 + [0] * 60, [1] * 400))
    assert high - low == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.85 * 0.15 / 400), rel=0.06)
    assert low < 85 < high


def test_the_same_scores_have_the_same_interval() -> None:
    first, second = (interval(accuracy([1, 2, 3, 3, 1] * 9, [1, 2, 2, 3, 1] * 9)) for _ in range(2))
    assert first == second
    assert interval(accuracy([1], [1])) == (100, 100)


def test_the_value_of_a_metric_is_that_of_every_unit_once() -> None:
    metric = accuracy([1, 1, 0], [1, 1, 1])
    assert metric.value == float(metric) == metric.resampled(np.ones(3, dtype=np.int64)) == 100 * 2 / 3
    assert (metric.num_units, metric.units) == (3, "utterances")


def test_a_metric_that_pairs_utterances_is_drawn_by_its_own_units() -> None:
    """An equal error rate over speakers: a trial counts as often as its two speakers were drawn together."""
    generator = np.random.default_rng(1)
    enrolled, tested = (generator.integers(0, 12, 600) for _ in range(2))
    same = enrolled == tested
    scores = same * 1.5 + generator.normal(size=600)

    def resampled(counts: Counts) -> float:
        weights = np.where(same, counts[enrolled], counts[enrolled] * counts[tested])
        if not (weights[same].any() and weights[~same].any()):
            return float("nan")
        false, true, _ = roc_curve(same, scores, sample_weight=weights)
        return 100 * float(false[np.nanargmin(np.abs(1 - true - false))])

    metric = Metric.of(resampled, 12, "speakers")
    low, high = interval(metric)
    assert 0 < low < metric.value < high < 50
    assert intervals_of([{"eer": metric}], "eer").of == "speakers"


def test_resamples_without_a_metric_are_left_out() -> None:
    # Drawn with replacement, a fifth of the resamples miss the one reference that has a token.
    low, high = interval(rate([0, 1, 0], [0, 2, 0]))
    assert low == high == 50
    with pytest.raises(ValueError, match="sum to 0"):
        rate([1, 2], [0, 0])
    with pytest.raises(ValueError, match="one of each per unit"):
        rate([1, 2], [1])


def test_the_mean_of_folds_draws_from_all_of_them() -> None:
    folds = [accuracy([1] * hits + [0] * (50 - hits), [1] * 50) for hits in (20, 40)]
    mean = mean_of(folds)
    assert mean.value == 60 and mean.num_units == 100
    counts = np.arange(100)
    assert mean.resampled(counts) == (folds[0].resampled(counts[:50]) + folds[1].resampled(counts[50:])) / 2
    low, high = interval(mean)
    assert high - low == pytest.approx(2 * 1.96 * 50 * np.sqrt((0.4 * 0.6 + 0.8 * 0.2) / 50), rel=0.1)


def test_a_score_file_has_the_intervals_of_all_test_metrics() -> None:
    words, characters = rate([1, 0, 2], [4, 4, 4]), rate([2, 0, 5], [16, 16, 16])
    found = intervals_of([{"wer": words, "cer": characters, "plain": 3.0}], "wer")
    assert found.test == found.test_set == interval(words) and found.also == {"cer": interval(characters)}
    assert (found.of, found.level_percent, found.resamples) == ("utterances", 95, 1000)


def test_the_interval_of_several_heads_has_the_variance_of_test_set_and_heads() -> None:
    """Against scipy's standard error of the mean over heads, resampled by utterance, and the sample variance."""
    generator = np.random.default_rng(5)
    hard_U = generator.random(300)  # an utterance that is hard for one head is hard for all
    right_SU = np.array([generator.random(300) * 0.4 + 0.6 * hard_U < ease for ease in (0.62, 0.7, 0.66)])
    heads = [{"acc": rate(right_U)} for right_U in right_SU]
    found = intervals_of(heads, "acc")
    per_head = 100 * right_SU.mean(1)
    error = stats.bootstrap((100 * right_SU.mean(0),), np.mean, n_resamples=20_000, rng=generator).standard_error
    expected = 1.96 * np.sqrt(error**2 + per_head.var(ddof=1) / 3)
    assert found.test is not None and found.test_set is not None
    assert (found.test[1] - found.test[0]) / 2 == pytest.approx(expected, rel=0.05)
    assert (found.test_set[1] - found.test_set[0]) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert deviations(heads) == {"acc": pytest.approx(per_head.std(ddof=1))}
    assert float(means(heads, mean_of_heads)["acc"]) == pytest.approx(per_head.mean())


def test_heads_that_agree_add_nothing_and_no_end_leaves_the_scale() -> None:
    assert with_seeds(80.0, (77.0, 84.0), sd=0.0, num_heads=3) == (77.0, 84.0)
    low, high = with_seeds(99.0, (98.0, 100.0), sd=6.0, num_heads=3)
    assert high == 100 and low == pytest.approx(99 - np.hypot(1, 1.959964 * 6 / np.sqrt(3)))
    assert with_seeds(101.0, (99.0, 103.0), sd=0.0, num_heads=3)[1] == 103  # error rates have no upper end
    assert intervals_of([{"acc": accuracy([1] * 9, [1] * 9)}], "acc").test == (100, 100)
