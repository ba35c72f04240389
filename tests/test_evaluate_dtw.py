"""Subsequence warping against dtw-python, which the reference calls, and against a search over all paths."""

import itertools

import dtw
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from evaluate.dtw import distances, row_min_max, subsequence_costs, unit


def pair(seed: int, counts: list[int], num_query: int, dim: int = 8) -> tuple[np.ndarray, list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    query = generator.normal(size=(num_query, dim)).astype(np.float32)
    return query, [generator.normal(size=(count, dim)).astype(np.float32) for count in counts]


def starts_of(documents: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, documents[:-1])])


@pytest.mark.parametrize("num_query", [1, 2, 5, 17])
def test_costs_are_dtw_pythons(num_query: int) -> None:
    """Use the reference's distance and row normalisation, on documents shorter and longer than the query."""
    query, documents = pair(num_query, [9, 30, 4, 17, 60, 5], num_query)
    starts = starts_of(documents)
    ours = row_min_max(distances(unit(query), unit(np.concatenate(documents))), starts)
    costs = subsequence_costs(ours, starts)
    for number, document in enumerate(documents):
        theirs = np.exp(cdist(query, document, "cosine")) - 1
        low, high = theirs.min(1, keepdims=True), theirs.max(1, keepdims=True)
        theirs = (theirs - low) / np.clip(high - low, 1e-9, np.inf)
        found = dtw.dtw(theirs, step_pattern="asymmetric", open_begin=True, open_end=True)
        assert costs[number] == pytest.approx(found.normalizedDistance, abs=1e-5)


def test_costs_are_those_of_the_best_of_all_paths() -> None:
    generator = np.random.default_rng(3)
    distance = generator.random((4, 6)).astype(np.float32)
    paths = [
        (first, *(first + sum(steps[: n + 1]) for n in range(3)))
        for first in range(6)
        for steps in itertools.product((0, 1, 2), repeat=3)
    ]
    expected = min(
        np.mean([distance[row, column] for row, column in enumerate(path)]) for path in paths if max(path) < 6
    )
    assert subsequence_costs(distance, np.array([0]))[0] == pytest.approx(expected)


def test_a_document_costs_the_same_by_itself_and_among_others() -> None:
    query, documents = pair(0, [1, 2, 3, 1, 25, 2], 6)
    together = distances(unit(query), unit(np.concatenate(documents)))
    starts = starts_of(documents)
    for number, document in enumerate(documents):
        alone = distances(unit(query), unit(document))
        assert subsequence_costs(together, starts)[number] == subsequence_costs(alone, np.array([0]))[0]


def test_a_document_that_holds_the_query_costs_nothing() -> None:
    query, (document, other) = pair(1, [40, 40], 10)
    document[20:30] = 3 * query  # scaling does not change the cosine
    costs = subsequence_costs(distances(unit(query), unit(np.concatenate([document, other]))), np.array([0, 40]))
    assert costs[0] == pytest.approx(0, abs=1e-6)
    assert costs[1] > 0.3


def test_silence_and_constant_rows_stay_finite() -> None:
    query, document = np.zeros((6, 4), dtype=np.float32), np.zeros((9, 4), dtype=np.float32)
    distance = row_min_max(distances(unit(query), unit(document)), np.array([0]))
    assert np.isfinite(distance).all()
    assert subsequence_costs(distance, np.array([0]))[0] == 0
