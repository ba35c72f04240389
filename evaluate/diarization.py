"""Speaker turns, their labels by frame, and the diarisation error rate.

Shapes: T frames, S speakers of the system, R speakers of the reference, C cells, U recordings.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate.bootstrap import Metric, rate
from extract.base.errors import RetortError

Turn = tuple[str, float, float]  # speaker, start and end in seconds


def parse_turns(label: str, *, where: str) -> list[Turn]:
    """Parse `SPEAKER START END; …`. Raises RetortError, whose message begins with `where`, for anything else."""
    turns = []
    for text in filter(None, (part.strip() for part in label.split(";"))):
        try:
            speaker, start, end = text.split()
            turns.append((speaker, float(start), float(end)))
        except ValueError:
            raise RetortError(f"{where}: {text!r} is not a turn; expected `SPEAKER START END; …` in seconds") from None
    return turns


def frame_labels(turns: Sequence[Turn], num_frames: int, *, frame_s: float, speakers: int) -> NDArray[np.float32]:
    """Return 1 where a speaker speaks, float32 (num_frames, speakers).

    Boundaries are rounded to the nearest frame; speakers are in the order of their names.
    """
    names = sorted({speaker for speaker, _, _ in turns})
    labels_TS = np.zeros((num_frames, speakers), dtype=np.float32)
    for speaker, start, end in turns:
        labels_TS[round(start / frame_s) : round(end / frame_s), names.index(speaker)] = 1
    return labels_TS


def median_filtered(active_TS: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Return the median over an odd number of frames, padded with silence as scipy's `medfilt` pads with zeros."""
    if width == 1:
        return active_TS
    # Running sums: the count of active frames in a window is the difference of two of them. The median of booleans is
    # True where more than half are.
    sum_TS = np.cumsum(np.pad(active_TS, ((width // 2 + 1, width // 2), (0, 0))), axis=0)
    return np.asarray(sum_TS[width:] - sum_TS[:-width] > width // 2)


@dataclass(frozen=True)
class Reference:
    """Turns of one recording, cut at every turn boundary and frame boundary into cells with constant speakers."""

    seconds_C: NDArray[np.float64]  # length of each cell
    frame_C: NDArray[np.int64]  # frame that holds the cell; num_frames for cells after the last frame
    active_CR: NDArray[np.bool_]

    @classmethod
    def of(cls, turns: Sequence[Turn], num_frames: int, *, frame_s: float) -> "Reference":
        """Cut frames [t frame_s, (t + 1) frame_s) and turns, which may end after the last frame, into cells."""
        names = sorted({speaker for speaker, _, _ in turns})
        grid = np.arange(num_frames + 1) * frame_s
        edges = np.unique(np.concatenate([grid, [time for _, start, end in turns for time in (start, end)]]))
        middle_C = (edges[:-1] + edges[1:]) / 2
        active_CR = np.zeros((len(middle_C), len(names)), dtype=bool)
        for speaker, start, end in turns:
            active_CR[(middle_C > start) & (middle_C < end), names.index(speaker)] = True
        frame_C = np.minimum(np.searchsorted(grid, middle_C, side="right") - 1, num_frames)
        return cls(np.diff(edges), frame_C, active_CR)

    @property
    def speech_s(self) -> float:
        """Return seconds of speech; overlapping speech of two speakers counts twice."""
        return float(self.seconds_C @ self.active_CR.sum(1))

    def error_s(self, active_TS: NDArray[np.bool_]) -> float:
        """Return seconds of miss, false alarm and confusion under the best mapping of the system's speakers.

        Error time of a cell: max(speakers of the reference, speakers of the system) - correctly mapped speakers.
        """
        system_CS = np.concatenate([active_TS, np.zeros_like(active_TS[:1])])[self.frame_C]  # silence after the end
        most_C = np.maximum(system_CS.sum(1), self.active_CR.sum(1))
        together_RS = np.einsum("c,cr,cs->rs", self.seconds_C, self.active_CR, system_CS, optimize=True)
        few, many = sorted(together_RS.shape)
        rows = together_RS if together_RS.shape[0] == few else together_RS.T
        # All one-to-one mappings of two or three speakers are few enough to try.
        matched = max(rows[range(few), list(order)].sum() for order in itertools.permutations(range(many), few))
        return float(self.seconds_C @ most_C - matched)


def diarization_error_rate(references: Sequence[Reference], systems: Sequence[NDArray[np.bool_]]) -> Metric:
    """Return the DER in percent over all recordings: no collar, overlap scored. systems: bool (T, S) per recording.

    Same as NIST's md-eval with -c 0, which the reference's dscore runs. Raises ValueError if there is no speech.
    """
    speech_s_U = [reference.speech_s for reference in references]
    if not sum(speech_s_U):
        raise ValueError("a diarisation error rate over no speech is not defined")
    wrong_s_U = [reference.error_s(active_TS) for reference, active_TS in zip(references, systems, strict=True)]
    return rate(wrong_s_U, speech_s_U, units="recordings")
