"""Metrics against jiwer, speech-metrics and hand counts, and at the edges where implementations differ."""

import importlib.metadata
import sys
from types import ModuleType

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.metrics import (
    accuracy,
    character_error_rate,
    slot_type_f1,
    slot_value_cer,
    token_error_rate,
    word_error_rate,
)

word = st.text("ABCD'", min_size=1, max_size=4)
sentence = st.lists(word, min_size=1, max_size=8).map(" ".join)
pairs = st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_rates_equal_jiwer(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = map(list, zip(*pairs, strict=True))
    assert word_error_rate(hypotheses, references).value == pytest.approx(100 * jiwer.wer(references, hypotheses))
    assert character_error_rate(hypotheses, references).value == pytest.approx(100 * jiwer.cer(references, hypotheses))


def reference_authors(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """speech_metrics/NAME.py by itself: the package around it imports signal metrics that nothing here needs."""
    try:
        files = importlib.metadata.files("speech-metrics") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("speech-metrics is not installed")
    (path,) = (file.locate() for file in files if file.as_posix() == f"speech_metrics/{name}.py")
    # A package of that folder whose __init__ is not run, so that its modules may import one another.
    package = ModuleType("reference_authors")
    package.__path__ = [str(path.parent)]  # type: ignore[union-attr]
    monkeypatch.setitem(sys.modules, "reference_authors", package)
    module = importlib.import_module(f"reference_authors.{name}")
    for loaded in [key for key in sys.modules if key.startswith("reference_authors.")]:
        monkeypatch.delitem(sys.modules, loaded)
    return module


def test_rates_equal_the_reference_authors_package(monkeypatch: pytest.MonkeyPatch) -> None:
    speech_metrics = reference_authors("common", monkeypatch)
    generator = np.random.default_rng(0)

    def sentences() -> list[str]:
        return [" ".join(generator.choice(["AA1", "B", "K", "s", "T"], generator.integers(1, 9))) for _ in range(40)]

    hypotheses, references = sentences(), sentences()
    assert word_error_rate(hypotheses, references).value == pytest.approx(
        100 * speech_metrics.wer(hypotheses, references)
    )
    assert character_error_rate(hypotheses, references).value == pytest.approx(
        100 * speech_metrics.cer(hypotheses, references)
    )
    upper = [text.upper() for text in hypotheses], [text.upper() for text in references]
    phones = ([text.split() for text in some] for some in upper)
    assert token_error_rate(*phones).value == pytest.approx(100 * speech_metrics.per(*upper))


slots = st.lists(
    st.tuples(st.sampled_from(["city", "track", "artist"]), st.text("ABC", min_size=1, max_size=5)), max_size=5
)
# speech-metrics cannot read a line without slots.
some_slots = slots.filter(bool)


def test_slot_metrics_equal_the_reference_authors_package(monkeypatch: pytest.MonkeyPatch) -> None:
    speech_metrics = reference_authors("slot_filling", monkeypatch)

    def lines(some: list[list[tuple[str, str]]]) -> list[str]:
        return [", ".join(f"{kind}: {value}" for kind, value in row) for row in some]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(some_slots, some_slots), min_size=1, max_size=6))
    def check(pairs: list[tuple[list[tuple[str, str]], list[tuple[str, str]]]]) -> None:
        hypotheses, references = map(list, zip(*pairs, strict=True))
        assert slot_type_f1(hypotheses, references).value == pytest.approx(
            100 * speech_metrics.slot_type_f1(lines(hypotheses), lines(references))
        )
        # 0.2.2 takes the hypotheses for the references and the other way round; s3prl's own metric does not.
        expected = speech_metrics.slot_value_cer(lines(references), lines(hypotheses))
        assert slot_value_cer(hypotheses, references).value == pytest.approx(100 * expected)

    check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(slots, slots), min_size=1, max_size=6))
def test_f1_is_symmetric_within_bounds_and_full_where_types_agree(
    pairs: list[tuple[list[tuple[str, str]], list[tuple[str, str]]]],
) -> None:
    hypotheses, references = map(list, zip(*pairs, strict=True))
    assert slot_type_f1(hypotheses, references).value == pytest.approx(slot_type_f1(references, hypotheses).value)
    assert 0 <= slot_type_f1(hypotheses, references).value <= 100
    assert slot_type_f1([[(kind, "other") for kind, _ in row] for row in references], references).value == 100
    if any(references):
        assert slot_value_cer(references, references).value == 0
        assert slot_value_cer([[] for _ in references], references).value == 100


def test_slot_type_f1_by_hand() -> None:
    # 2 of 3 types are correct, 2 of 2 are found: precision 2/3, recall 1, F1 0.8. A type that occurs twice is one type.
    hypotheses = [("city", "ROME"), ("city", "PARIS"), ("track", "X"), ("artist", "Y")]
    references = [("city", "OSLO"), ("track", "Z")]
    assert slot_type_f1([hypotheses], [references]).value == pytest.approx(80)
    # A mean over utterances, not over slots: 1, 0 and 0 where one side is empty, 1 where both are.
    assert slot_type_f1([[("a", "X")], [("a", "X")], [], []], [[("a", "Y")], [], [("a", "Y")], []]).value == 50
    assert slot_type_f1([[("a", "X")]], [[("b", "X")]]).value == 0


def test_slot_value_cer_by_hand() -> None:
    # The closest of the type: PARIS against PARIZ is 1 edit of 5; ROME has nothing of its type, 4 of 4.
    hypotheses = [("city", "OSLO"), ("city", "PARIZ"), ("track", "ROME")]
    assert slot_value_cer([hypotheses], [[("city", "PARIS"), ("artist", "ROME")]]).value == pytest.approx(100 * 5 / 9)
    # Two references of a type may take the same value; a hypothesis beyond the references costs nothing.
    assert slot_value_cer([[("a", "XY"), ("b", "Q")]], [[("a", "XY"), ("a", "XZ")]]).value == 25
    # Over the corpus, not a mean of utterances, and insertions count.
    assert slot_value_cer([[("a", "XYZ")], [("a", "LONG")]], [[("a", "X")], [("a", "LONG")]]).value == pytest.approx(40)
    # Upper and lower case differ, as in the reference.
    assert slot_value_cer([[("a", "x")]], [[("a", "X")]]).value == 100


def test_slot_metrics_without_slots_or_utterances() -> None:
    with pytest.raises(ValueError, match="without a slot is not defined"):
        slot_value_cer([[("a", "X")], []], [[], []])
    with pytest.raises(ValueError, match="over no utterance"):
        slot_type_f1([], [])
    for metric in (slot_type_f1, slot_value_cer):
        with pytest.raises(ValueError, match="is longer than"):
            metric([[]], [[("a", "X")], []])


def test_the_rate_is_over_the_corpus_not_a_mean_of_rates() -> None:
    # 1 edit of 1 and 0 of 3: 25% over the corpus, 50% as a mean.
    assert word_error_rate(["X", "A B C"], ["A", "A B C"]).value == 25.0


def test_an_empty_hypothesis_costs_its_reference() -> None:
    assert word_error_rate(["", "A"], ["A B C", "A"]).value == 75.0
    assert character_error_rate([""], ["AB"]).value == 100.0


def test_words_against_an_empty_reference_are_insertions() -> None:
    assert word_error_rate(["A B", "C"], ["", "C"]).value == 200.0


def test_no_reference_token_has_no_rate() -> None:
    with pytest.raises(ValueError, match="not defined"):
        word_error_rate(["A", ""], ["", " "])
    with pytest.raises(ValueError, match="not defined"):
        token_error_rate([], [])


def test_word_error_rate_ignores_case_and_token_error_rate_does_not() -> None:
    assert word_error_rate(["go on"], ["GO ON"]).value == 0.0
    assert token_error_rate([["ah0"]], [["AH0"]]).value == 100.0


def test_stress_and_length_of_a_phone_matter_as_a_whole() -> None:
    # One wrong symbol is one edit, whatever its spelling; as characters these would be two.
    assert token_error_rate([["AH0", "ZH"]], [["AH0", "B"]]).value == 50.0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="is longer than"):
        word_error_rate(["A"], ["A", "B"])
    with pytest.raises(ValueError, match="is longer than"):
        accuracy([1], [1, 2])


def test_accuracy() -> None:
    assert accuracy([1, 2, 3, 3], [1, 2, 3, -1]).value == 75.0
    assert accuracy([[1, 2, 0], [1, 2, 0]], [[1, 2, 0], [1, 1, 0]]).value == 50.0  # several labels: all right, or wrong
    with pytest.raises(ValueError, match="no examples"):
        accuracy([], [])
