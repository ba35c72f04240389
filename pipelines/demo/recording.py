"""Recording jobs: frozen values that a process turns into audio files of one corpus.

A job writes below its root and returns what it wrote. It draws all random numbers from a generator of its own seed, so
its files do not depend on other jobs.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.room_acoustics import SAMPLE_RATE_HZ


@dataclass
class Recorded:
    """The result of one job.

    seconds: length of each file by its path relative to the corpus's folder, in the order of writing.
    notes: lines of the corpus's lists that only the synthesis determines, such as speech segments.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, root: Path, path: Path, samples: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> float:
        """Write float (n,) samples to root/path, note their length and return it in seconds."""
        self.seconds[str(path)] = write_audio(root / path, samples, rate_hz)
        return self.seconds[str(path)]


@dataclass(frozen=True, kw_only=True)
class RecordingJob(ABC):
    """A job that writes files below `root`. `seed` determines all that it draws."""

    root: Path
    seed: int

    @abstractmethod
    def record(self, synthesiser: Synthesiser) -> Recorded:
        """Synthesise and write the files of the job."""


def run_job(job: RecordingJob) -> Recorded:
    """Run `job` with the one synthesiser of this process; ProcessPool calls this in a fresh process."""
    return job.record(Synthesiser())


def write_audio(path: Path, samples: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> float:
    """Write float (n,) samples in [-1, 1] as 16-bit FLAC or WAV, chosen by the suffix; return their seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Encode in memory: libsndfile reports a full disk as "System error", Python with the cause and the path.
    encoded = io.BytesIO()
    values = (samples * 32767).astype(np.int16)  # truncated towards zero
    soundfile.write(encoded, values, rate_hz, subtype="PCM_16", format=path.suffix[1:].upper())
    path.write_bytes(encoded.getvalue())
    return len(samples) / rate_hz


def scaled(count: int, scale: float, least: int) -> int:
    """Return `count` times the scale of the configuration, at least `least`."""
    return max(least, round(count * scale))


def spawn_seeds(seed: int, count: int) -> list[int]:
    """Return `count` independent seeds derived from one."""
    return [int(state) for state in np.random.SeedSequence(seed).generate_state(count)]
