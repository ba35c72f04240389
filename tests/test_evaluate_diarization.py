"""DER against simpleder, worked examples and a search over mappings; frame labels; the median filter."""

import itertools

import numpy as np
import pytest
import simpleder
from scipy.signal import medfilt

from evaluate.diarization import (
    Reference,
    Turn,
    diarization_error_rate,
    frame_labels,
    median_filtered,
    parse_turns,
)
from extract.base.errors import RetortError

FRAME_S = 0.02


def der(turns: list[Turn], active: np.ndarray) -> float:
    return diarization_error_rate([Reference.of(turns, len(active), frame_s=FRAME_S)], [active]).value


def as_turns(active_TS: np.ndarray) -> list[Turn]:
    """Return a system's output as turns of one frame, which simpleder merges."""
    return [(f"s{s}", t * FRAME_S, (t + 1) * FRAME_S) for t, s in zip(*np.nonzero(active_TS), strict=True)]


def random_turns(generator: np.random.Generator, speakers: int, seconds: float) -> list[Turn]:
    """Draw turns that overlap between speakers only; boundaries are anywhere, some after the last frame."""
    turns = []
    for speaker in range(speakers):
        edges = np.sort(generator.uniform(0, seconds, 4)).tolist()
        turns += [(f"r{speaker}", edges[0], edges[1]), (f"r{speaker}", edges[2], edges[3])]
    return turns


@pytest.mark.parametrize("speakers", [1, 2, 3])
def test_the_rate_is_simpleders(speakers: int) -> None:
    generator = np.random.default_rng(speakers)
    for _ in range(40):
        turns = random_turns(generator, speakers, 2.1)
        active = np.repeat(generator.random((20, 2)) < generator.uniform(0, 1), 5, axis=0)
        expected = 100 * simpleder.DER(turns, as_turns(active))
        assert der(turns, active) == pytest.approx(expected, abs=1e-6)


def test_the_rate_is_the_best_of_all_matchings() -> None:
    """Compare with the definition on a fine grid: max(reference, system) - correct at every moment."""
    generator = np.random.default_rng(9)
    for _ in range(20):
        labels, active = (generator.random((50, 2)) < 0.4 for _ in range(2))
        turns = [(f"r{s}", t * FRAME_S, (t + 1) * FRAME_S) for t, s in zip(*np.nonzero(labels), strict=True)]
        most = np.maximum(labels.sum(1), active.sum(1)).sum()
        correct = max((labels & active[:, list(order)]).sum() for order in itertools.permutations(range(2)))
        assert der(turns, active) == pytest.approx(100 * (most - correct) / labels.sum())


def test_the_rate_by_hand() -> None:
    turns = [("ann", 0.0, 1.0), ("bob", 0.5, 1.5)]
    active = np.zeros((100, 2), dtype=bool)
    assert der(turns, active) == pytest.approx(100)  # all missed
    active[0:50, 1] = active[25:75, 0] = True
    assert der(turns, active) == pytest.approx(0)  # the names of the system's speakers do not matter
    active[75:100, 0] = True  # half a second too much, of two seconds of speech
    assert der(turns, active) == pytest.approx(25)
    active[:] = False
    active[0:75, 0] = True  # bob alone (0.5 s) is confused, overlap (0.5 s) missed
    assert der(turns, active) == pytest.approx(50)


def test_recordings_are_weighted_by_their_speech() -> None:
    long, short = [("a", 0.0, 1.8)], [("b", 0.0, 0.2)]
    correct, silent = np.ones((90, 2), dtype=bool), np.zeros((10, 2), dtype=bool)
    correct[:, 1] = False
    references = [Reference.of(long, 90, frame_s=FRAME_S), Reference.of(short, 10, frame_s=FRAME_S)]
    assert diarization_error_rate(references, [correct, silent]).value == pytest.approx(10)


def test_a_recording_of_silence_counts_its_false_alarms_and_silence_alone_has_no_rate() -> None:
    silent, spoken = Reference.of([], 50, frame_s=FRAME_S), Reference.of([("a", 0, 1)], 50, frame_s=FRAME_S)
    half = np.zeros((50, 2), dtype=bool)
    half[:25, 0] = True
    assert diarization_error_rate([silent, spoken], [half, half]).value == pytest.approx(100)
    with pytest.raises(ValueError, match="no speech"):
        diarization_error_rate([silent], [half])


def test_speech_after_the_last_frame_is_missed() -> None:
    assert der([("a", 0.0, 2.0)], np.ones((50, 1), dtype=bool)) == pytest.approx(50)


@pytest.mark.parametrize("width", [1, 3, 11])
def test_the_median_filter_is_scipys(width: int) -> None:
    active = np.random.default_rng(width).random((60, 2)) < 0.5
    expected = np.stack([medfilt(column.astype(float), width) for column in active.T], 1).astype(bool)
    np.testing.assert_array_equal(median_filtered(active, width), expected)


def test_frame_labels_go_to_the_nearest_frame_in_the_order_of_names() -> None:
    labels = frame_labels([("bob", 0.009, 0.051), ("ann", 0.031, 9.0)], 6, frame_s=FRAME_S, speakers=2)
    assert labels[:, 1].tolist() == [1, 1, 1, 0, 0, 0]
    assert labels[:, 0].tolist() == [0, 0, 1, 1, 1, 1]
    assert frame_labels([], 3, frame_s=FRAME_S, speakers=2).sum() == 0


def test_turns_are_parsed_and_anything_else_is_named() -> None:
    assert parse_turns("ann 0.5 1.25; bob 1 2", where="x") == [("ann", 0.5, 1.25), ("bob", 1.0, 2.0)]
    assert parse_turns("", where="x") == []
    with pytest.raises(RetortError, match=r"here: 'ann 0\.5' is not a turn"):
        parse_turns("ann 0.5", where="here")
