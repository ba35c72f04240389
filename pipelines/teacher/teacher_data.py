"""Training data of the demo teacher: synthetic speech with the phone of every frame and the speaker of every utterance.

    python -m pipelines.teacher.teacher_data --out data/teacher          about 2 minutes on 2 cores for 7 h of speech

Two sets, each one .npz with int16 samples end to end: `train` (the teacher's voices, sentences of the part `teacher`)
and `probe` (voices of the scored corpora, sentences of the part `distill`), neither of which the teacher is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from extract.base.errors import RetortError
from extract.base.files import written_aside
from extract.store.packing import count_frames
from pipelines.demo.espeak import Speech, Synthesiser
from pipelines.demo.process_pool import ProcessPool
from pipelines.demo.room_acoustics import SAMPLE_RATE_HZ, apply_random_room
from pipelines.demo.sentences import VOCABULARY, sentences
from pipelines.demo.voices import SCORED_VARIANTS, TEACHER_VARIANTS, Voice, draw_voices

HOP_SAMPLES, RECEPTIVE_SAMPLES = 320, 400  # of HuBERT's convolution stem
SNR_DB = (3.0, 30.0)
SHARE_OF_SINGLE_WORDS = 0.15  # the input of keyword spotting is one word in one second
# set -> voice variants, part of the sentences
SETS = {"train": (TEACHER_VARIANTS, "teacher"), "probe": (SCORED_VARIANTS, "distill")}


@dataclass(frozen=True)
class SpeakerJob:
    """All utterances of one voice. `speaker` counts the voices of a set from 0."""

    voice: Voice
    speaker: int
    part: str
    num_utterances: int
    seed: int


@dataclass(frozen=True)
class TeacherData:
    """One loaded set.

    samples: int16 (n,), all utterances end to end. phones: int16 (frames,), end to end, indices into `phone_names`.
    num_samples, num_frames, speaker: int64 (utterances,).
    """

    samples: np.ndarray
    phones: np.ndarray
    phone_names: np.ndarray
    num_samples: np.ndarray
    num_frames: np.ndarray
    speaker: np.ndarray

    @classmethod
    def open(cls, folder: Path, name: str) -> TeacherData:
        """Read FOLDER/NAME.npz. Raises RetortError where it is missing."""
        path = folder / f"{name}.npz"
        if not path.exists():
            raise RetortError(f"{path} not found; make it with python -m pipelines.teacher.teacher_data --out {folder}")
        with np.load(path) as arrays:
            return cls(**arrays)

    @cached_property
    def start(self) -> np.ndarray:
        """First sample of each utterance, int64 (utterances,)."""
        return np.asarray(np.cumsum(self.num_samples) - self.num_samples)

    @cached_property
    def first_frame(self) -> np.ndarray:
        """First frame of each utterance, int64 (utterances,)."""
        return np.asarray(np.cumsum(self.num_frames) - self.num_frames)

    def waveform(self, index: int, first: int, num_samples: int) -> np.ndarray:
        """Return `num_samples` of an utterance from its sample `first` on, float32 (num_samples,) in [-1, 1)."""
        start = self.start[index] + first
        return self.samples[start : start + num_samples].astype(np.float32) / 32768

    def phones_of(self, index: int, first: int, num_frames: int) -> np.ndarray:
        """Return the phones of `num_frames` frames of an utterance from the frame `first` on, int64 (num_frames,)."""
        start = self.first_frame[index] + first
        return self.phones[start : start + num_frames].astype(np.int64)


def hubert_frames(num_samples: int) -> int:
    """Return the number of frames of HuBERT's convolution stem."""
    return int(count_frames(np.array(num_samples), hop_samples=HOP_SAMPLES, receptive_samples=RECEPTIVE_SAMPLES))


def phone_of_frames(speech: Speech) -> list[str]:
    """Return the phone at the middle of every frame; stress marks are kept, all pauses are `_`."""
    middles = np.arange(hubert_frames(len(speech.samples))) * HOP_SAMPLES + RECEPTIVE_SAMPLES // 2
    starts = np.array([phone.start for phone in speech.phones])
    names = ["_" if phone.is_pause else phone.name for phone in speech.phones]
    return [names[max(index, 0)] for index in np.searchsorted(starts, middles, side="right") - 1]


def synthesise(job: SpeakerJob) -> list[tuple[np.ndarray, list[str], int]]:
    """Return (int16 samples, phone of every frame, speaker) of every utterance of one voice."""
    generator = np.random.default_rng(job.seed)
    synthesiser, texts = Synthesiser(), sentences(job.part, generator)
    utterances = []
    for _ in range(job.num_utterances):
        single = generator.random() < SHARE_OF_SINGLE_WORDS
        text = VOCABULARY[int(generator.integers(len(VOCABULARY)))] if single else next(texts)
        speech = synthesiser.synthesise(text, job.voice.varied(generator))
        samples = apply_random_room(speech.samples, SNR_DB, generator)  # keeps the times of the phones
        utterances.append(((samples * 32767).astype(np.int16), phone_of_frames(speech), job.speaker))
    return utterances


def plan_set(name: str, num_voices: int, num_utterances: int, seed: int) -> list[SpeakerJob]:
    """Return the jobs of the set `name`, a key of SETS."""
    variants, part = SETS[name]
    voices = draw_voices(variants, num_voices, np.random.default_rng(seed))
    seeds = np.random.SeedSequence(seed).generate_state(num_voices)
    return [SpeakerJob(v, i, part, num_utterances, int(s)) for i, (v, s) in enumerate(zip(voices, seeds, strict=True))]


def write_set(path: Path, jobs: list[SpeakerJob], workers: int) -> None:
    """Synthesise the jobs and write them as one .npz, the fields of TeacherData."""
    with ProcessPool(workers) as pool:
        progress = track(pool.map(synthesise, jobs), path.stem, total=len(jobs))
        utterances = [utterance for some in progress for utterance in some]
    samples, phones, speakers = zip(*utterances, strict=True)
    phone_names, indices = np.unique(np.concatenate(phones), return_inverse=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(
            file,
            samples=np.concatenate(samples),
            phones=indices.astype(np.int16),
            phone_names=phone_names,
            num_samples=np.array([len(one) for one in samples]),
            num_frames=np.array([len(one) for one in phones]),
            speaker=np.array(speakers),
        )
    hours = sum(map(len, samples)) / SAMPLE_RATE_HZ / 3600
    click.echo(f"{path}: {len(utterances)} utterances, {hours:.2f} h, {len(jobs)} voices, {len(phone_names)} phones")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/teacher"), show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--seed", default=20_240, show_default=True)
def main(out: Path, workers: int, seed: int) -> None:
    """Synthesise the data that the demo teacher is trained and probed on."""
    out.mkdir(parents=True, exist_ok=True)
    write_set(out / "train.npz", plan_set("train", 480, 18, seed), workers)
    write_set(out / "probe.npz", plan_set("probe", 40, 18, seed + 1), workers)


if __name__ == "__main__":
    main()
