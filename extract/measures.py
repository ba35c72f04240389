"""Records of measurements: measures/speed.json and measures/compare/STUDENT.json.

They are written by `extract speed` and `extract compare`, and read by the report. This module imports no torch.
"""

from dataclasses import dataclass

from extract.base.errors import RetortError
from extract.base.provenance import Provenance
from extract.base.record import Record
from extract.base.timing import Range


@dataclass(frozen=True, kw_only=True)
class UpstreamSpeed:
    """Figures of one upstream; ranges are over the rounds."""

    source: str
    params: int
    macs_per_audio_s: int  # of an utterance of one second
    rtf: Range  # real-time factor: seconds of computing per second of audio
    latency_s: Range  # median over the utterances of a round
    peak_bytes: int  # resident memory of the process: libraries, loading, passes
    peak_gpu_bytes: int | None
    weight_bytes: int | None = None  # size of an ONNX file; None: float32 parameters, 4 bytes each

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights."""
        return 4 * self.params if self.weight_bytes is None else self.weight_bytes


@dataclass(frozen=True, kw_only=True)
class SpeedFile(Record):
    """Speed of all upstreams, measured together: measures/speed.json."""

    REMEDY = "`python -m extract speed`"

    upstreams: dict[str, UpstreamSpeed]
    corpus: str
    split: str
    audio_seconds: float
    num_utterances: int
    utterance_s: float  # median length
    device: str
    threads: int
    rounds: int
    machine: dict[str, str]
    provenance: Provenance | None = None  # None: by a version that did not record it


@dataclass(frozen=True, kw_only=True)
class CompareFile(Record):
    """Similarity of two stores: measures/compare/STUDENT.json.

    `linear_cka` has a row for each student layer and a column for each teacher layer; None for a layer that is constant
    over the frames. If the stores can't be compared, `problem` gives the reason and `linear_cka` is empty.
    """

    REMEDY = "`python -m extract compare`"

    teacher: str
    student: str
    teacher_digest: str  # of the stores
    student_digest: str
    teacher_layers: tuple[int, ...]
    student_layers: tuple[int, ...]
    corpus: str
    split: str
    num_utterances: int
    num_frames: int
    linear_cka: tuple[tuple[float | None, ...], ...]
    problem: str | None

    def __post_init__(self) -> None:
        expected = [] if self.problem else [len(self.teacher_layers)] * len(self.student_layers)
        if [len(row) for row in self.linear_cka] != expected:
            raise RetortError("linear_cka: expected a row for each student layer, a value for each teacher layer")

    def describe(self) -> str:
        """Return the result as one line of text."""
        if self.problem:
            return f"{self.student} and {self.teacher} can't be compared: {self.problem}"
        return (
            f"{len(self.student_layers)} layers of {self.student} with {len(self.teacher_layers)} of {self.teacher}, "
            f"{self.num_frames:,} frames of {self.num_utterances} utterances of {self.corpus}, split {self.split}"
        )
