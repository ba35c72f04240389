"""Who speaks when: turns, their labels by frame, and the diarisation error rate.

Shapes: T frames, S speakers of the system, R of the reference, C cells.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate.bootstrap import Measured, rate
from extract.base.errors import RetortError

Turn = tuple[str, float, float]  # speaker, start and end in seconds


def parse_turns(label: str, *, where: str) -> list[Turn]:
    """`SPEAKER START END; …` -> turns. Raises RetortError, which begins with `where`, for anything else."""
    turns = []
    for text in filter(None, (part.strip() for part in label.split(";"))):
        try:
            speaker, start, end = text.split()
            turns.append((speaker, float(start), float(end)))
        except ValueError:
            raise RetortError(f"{where}: {text!r} is no turn; expected `SPEAKER START END; …` in seconds") from None
    return turns


def frame_labels(turns: Sequence[Turn], num_frames: int, *, frame_s: float, speakers: int) -> NDArray[np.float32]:
    """1 where a speaker speaks, float32 (num_frames, speakers); boundaries to the nearest frame, speakers by name."""
    names = sorted({speaker for speaker, _, _ in turns})
    labels_TS = np.zeros((num_frames, speakers), dtype=np.float32)
    for speaker, start, end in turns:
        labels_TS[round(start / frame_s) : round(end / frame_s), names.index(speaker)] = 1
    return labels_TS


def median_filtered(active_TS: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The median over an odd number of frames, as scipy's medfilt: silence lies before the first and after the last."""
    if width == 1:
        return active_TS
    count_TS = np.cumsum(np.pad(active_TS, ((width // 2 + 1, width // 2), (0, 0))), axis=0)
    return np.asarray(count_TS[width:] - count_TS[:-width] > width // 2)


@dataclass(frozen=True)
class Reference:
    """Turns of one recording, cut into cells within which neither they nor the frames change."""

    seconds_C: NDArray[np.float64]
    frame_C: NDArray[np.int64]  # the frame that a cell lies in; num_frames behind the last
    active_CR: NDArray[np.bool_]

    @classmethod
    def of(cls, turns: Sequence[Turn], num_frames: int, *, frame_s: float) -> "Reference":
        """The cells of frames [t frame_s, (t + 1) frame_s) and of the turns, which may go on behind the last frame."""
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
        """Seconds of speech; what two say at once counts twice."""
        return float(self.seconds_C @ self.active_CR.sum(1))

    def error_s(self, active_TS: NDArray[np.bool_]) -> float:
        """Seconds of miss, false alarm and confusion, under the best matching of the system's speakers to these.

        At any moment as many seconds are wrong as the more of both have speakers, less those that match.
        """
        system_CS = np.concatenate([active_TS, np.zeros_like(active_TS[:1])])[self.frame_C]
        most_C = np.maximum(system_CS.sum(1), self.active_CR.sum(1))
        together_RS = np.einsum("c,cr,cs->rs", self.seconds_C, self.active_CR, system_CS, optimize=True)
        few, many = sorted(together_RS.shape)
        rows = together_RS if together_RS.shape[0] == few else together_RS.T
        matched = max(rows[range(few), list(order)].sum() for order in itertools.permutations(range(many), few))
        return float(self.seconds_C @ most_C - matched)


def diarization_error_rate(references: Sequence[Reference], systems: Sequence[NDArray[np.bool_]]) -> Measured:
    """DER in percent over all recordings: no collar, overlap scored. systems: bool (T, S) of each recording.

    As md-eval of NIST, which the reference's dscore calls, with -c 0. Raises ValueError where nobody speaks.
    """
    speech_s_U = [reference.speech_s for reference in references]
    if not sum(speech_s_U):
        raise ValueError("a diarisation error rate over no speech is not defined")
    wrong_s_U = [reference.error_s(active_TS) for reference, active_TS in zip(references, systems, strict=True)]
    return rate(wrong_s_U, speech_s_U, units="recordings")
