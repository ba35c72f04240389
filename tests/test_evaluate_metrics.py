"""Metrics against jiwer, speech-metrics and hand counts, and at the edges where implementations differ."""

import importlib.metadata
import importlib.util
from types import ModuleType

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.metrics import accuracy, character_error_rate, phone_error_rate, token_error_rate, word_error_rate

word = st.text("ABCD'", min_size=1, max_size=4)
sentence = st.lists(word, min_size=1, max_size=8).map(" ".join)
pairs = st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_rates_equal_jiwer(said_and_meant: list[tuple[str, str]]) -> None:
    hypotheses, references = map(list, zip(*said_and_meant, strict=True))
    assert word_error_rate(hypotheses, references) == pytest.approx(100 * jiwer.wer(references, hypotheses))
    assert character_error_rate(hypotheses, references) == pytest.approx(100 * jiwer.cer(references, hypotheses))


def reference_authors_rates() -> ModuleType:
    """speech_metrics/common.py by itself: the package around it imports signal metrics that nothing here needs."""
    try:
        files = importlib.metadata.files("speech-metrics") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("speech-metrics is not installed")
    (path,) = (file.locate() for file in files if file.as_posix() == "speech_metrics/common.py")
    spec = importlib.util.spec_from_file_location("reference_authors_rates", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rates_equal_the_reference_authors_package() -> None:
    speech_metrics = reference_authors_rates()
    generator = np.random.default_rng(0)

    def sentences() -> list[str]:
        return [" ".join(generator.choice(["AA1", "B", "K", "s", "T"], generator.integers(1, 9))) for _ in range(40)]

    hypotheses, references = sentences(), sentences()
    assert word_error_rate(hypotheses, references) == pytest.approx(100 * speech_metrics.wer(hypotheses, references))
    assert character_error_rate(hypotheses, references) == pytest.approx(
        100 * speech_metrics.cer(hypotheses, references)
    )
    upper = [text.upper() for text in hypotheses], [text.upper() for text in references]
    assert phone_error_rate(*upper) == pytest.approx(100 * speech_metrics.per(*upper))


def test_the_rate_is_over_the_corpus_not_a_mean_of_rates() -> None:
    # 1 edit of 1 and 0 of 3: 25% over the corpus, 50% as a mean.
    assert word_error_rate(["X", "A B C"], ["A", "A B C"]) == 25.0


def test_an_empty_hypothesis_costs_its_reference() -> None:
    assert word_error_rate(["", "A"], ["A B C", "A"]) == 75.0
    assert phone_error_rate([""], ["AA1 B"]) == 100.0
    assert character_error_rate([""], ["AB"]) == 100.0


def test_words_against_an_empty_reference_are_insertions() -> None:
    assert word_error_rate(["A B", "C"], ["", "C"]) == 200.0


def test_no_reference_token_has_no_rate() -> None:
    with pytest.raises(ValueError, match="not defined"):
        word_error_rate(["A", ""], ["", " "])
    with pytest.raises(ValueError, match="not defined"):
        token_error_rate([], [])


def test_word_error_rate_ignores_case_and_phone_error_rate_does_not() -> None:
    assert word_error_rate(["go on"], ["GO ON"]) == 0.0
    assert phone_error_rate(["ah0"], ["AH0"]) == 100.0


def test_stress_and_length_of_a_phone_matter_as_a_whole() -> None:
    # One wrong symbol is one edit, whatever its spelling; as characters these would be two.
    assert token_error_rate([["AH0", "ZH"]], [["AH0", "B"]]) == 50.0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="is longer than"):
        word_error_rate(["A"], ["A", "B"])
    with pytest.raises(ValueError, match="is longer than"):
        accuracy([1], [1, 2])


def test_accuracy() -> None:
    assert accuracy([1, 2, 3, 3], [1, 2, 3, -1]) == 75.0
    with pytest.raises(ValueError, match="no examples"):
        accuracy([], [])
