"""What every corpus of the demo is made of: jobs that speak one voice and write its files.

A job is a frozen value that can be sent to another process; `record()` writes below the job's root and returns what it
wrote. All that a job draws comes from its own seed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile

from pipelines.demo.espeak import SAMPLE_RATE_HZ, Speaker


@dataclass(frozen=True)
class Recorded:
    """What one job wrote: seconds of audio by path relative to the corpus's folder, in order of writing.

    `notes`: what only the speaking tells and the corpus's lists need, in the corpus's own form.
    """

    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class Job(Protocol):
    """One voice to record below `root`; `planned_s`, roughly how much audio that gives, moves the progress bar."""

    @property
    def root(self) -> Path: ...

    @property
    def planned_s(self) -> float: ...

    def record(self, speaker: Speaker) -> Recorded: ...


def record(job: Job) -> Recorded:
    """Run `job` with this process's one Speaker; the booth calls it in a fresh process."""
    return job.record(Speaker())


def write_audio(path: Path, samples: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> float:
    """Write float (n,) samples as 16-bit FLAC or WAV, by the suffix; returns their seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Encoded in memory: libsndfile calls a full disk a "System error", Python says which disk and why.
    encoded = io.BytesIO()
    values = (samples * 32767).astype(np.int16)
    soundfile.write(encoded, values, rate_hz, subtype="PCM_16", format=path.suffix[1:].upper())
    path.write_bytes(encoded.getvalue())
    return len(samples) / rate_hz


def scaled(count: int, scale: float, least: int) -> int:
    """`count` of something at the config's scale, but never fewer than `least`."""
    return max(least, round(count * scale))


def spawn_seeds(seed: int, count: int) -> list[int]:
    """`count` independent seeds from one."""
    return [int(state) for state in np.random.SeedSequence(seed).generate_state(count)]
