"""What the demo teacher is taught from: speech with the phone of every frame and the voice that said it.

    python -m pipelines.teacher.teacher_data --out data/lessons          about 2 minutes on 2 cores for 7 h of speech

Two sets: `teach` (taught variants, sentences of the part `teacher`) and `probe` (scored variants, which the teacher
never hears, sentences of the part `distill`, which it never reads). Each is one .npz, int16 samples end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from extract.base.errors import RetortError
from extract.base.files import written_aside
from pipelines.demo.espeak import SAMPLE_RATE_HZ, Speaker, Speech
from pipelines.demo.process_pool import ProcessPool
from pipelines.demo.room_acoustics import draw_place, heard_in
from pipelines.demo.sentences import VOCABULARY, sentences
from pipelines.demo.voices import SCORED_VARIANTS, TAUGHT_VARIANTS, Voice, draw_voices

HOP_SAMPLES, RECEPTIVE_SAMPLES = 320, 400
SNR_DB = (3.0, 30.0)
SHARE_OF_SINGLE_WORDS = 0.15  # keyword spotting hears one word in one second


@dataclass(frozen=True)
class Lesson:
    """All utterances of one voice. `speaker` counts the voices of a set from 0."""

    voice: Voice
    speaker: int
    part: str
    num_utterances: int
    seed: int


@dataclass(frozen=True)
class Lessons:
    """One set, loaded.

    samples: int16 (n,), all utterances end to end. phones: int16 (frames,), end to end, indices into `phone_names`.
    start, num_samples, first_frame, num_frames, speaker: int64 (utterances,).
    """

    samples: np.ndarray
    phones: np.ndarray
    phone_names: list[str]
    start: np.ndarray
    num_samples: np.ndarray
    first_frame: np.ndarray
    num_frames: np.ndarray
    speaker: np.ndarray

    @classmethod
    def open(cls, folder: Path, name: str) -> Lessons:
        path = folder / f"{name}.npz"
        if not path.exists():
            raise RetortError(
                f"{path}: no lessons; speak them with python -m pipelines.teacher.teacher_data --out {folder}"
            )
        with np.load(path) as arrays:
            num_samples, num_frames = arrays["num_samples"], arrays["num_frames"]
            return cls(
                samples=arrays["samples"],
                phones=arrays["phones"],
                phone_names=[str(phone) for phone in arrays["phone_names"]],
                start=np.cumsum(num_samples) - num_samples,
                num_samples=num_samples,
                first_frame=np.cumsum(num_frames) - num_frames,
                num_frames=num_frames,
                speaker=arrays["speaker"],
            )

    def waveform(self, index: int, first: int, num_samples: int) -> np.ndarray:
        """`num_samples` of an utterance from its sample `first` on, float32 (num_samples,) in [-1, 1)."""
        start = self.start[index] + first
        return self.samples[start : start + num_samples].astype(np.float32) / 32768

    def phones_of(self, index: int, first: int, num_frames: int) -> np.ndarray:
        """The phones of `num_frames` of an utterance's frames from the frame `first` on, int64 (num_frames,)."""
        start = self.first_frame[index] + first
        return self.phones[start : start + num_frames].astype(np.int64)


def count_frames(num_samples: int) -> int:
    """Frames of the standard convolution stem."""
    return (num_samples - RECEPTIVE_SAMPLES) // HOP_SAMPLES + 1


def phone_of_frames(speech: Speech) -> list[str]:
    """The phone at the middle of every frame; stress marks are kept, all pauses are `_`."""
    middles = np.arange(count_frames(len(speech.samples))) * HOP_SAMPLES + RECEPTIVE_SAMPLES // 2
    starts = np.array([phone.start for phone in speech.phones])
    names = ["_" if phone.name.startswith("_") else phone.name for phone in speech.phones]
    return [names[max(index, 0)] for index in np.searchsorted(starts, middles, side="right") - 1]


def speak_lesson(lesson: Lesson) -> list[tuple[np.ndarray, list[str], int]]:
    """(int16 samples, phone of every frame, speaker) of every utterance of one voice."""
    generator = np.random.default_rng(lesson.seed)
    speaker, told = Speaker(), sentences(lesson.part, generator)
    takes = []
    for _ in range(lesson.num_utterances):
        alone = generator.random() < SHARE_OF_SINGLE_WORDS
        text = VOCABULARY[int(generator.integers(len(VOCABULARY)))] if alone else next(told)
        speech = speaker.speak(text, lesson.voice.moved(generator))
        noisy = heard_in(speech.samples, draw_place(generator, SNR_DB), generator)
        takes.append(((noisy * 32767).astype(np.int16), phone_of_frames(speech), lesson.speaker))
    return takes


def plan_lessons(name: str, num_voices: int, num_utterances: int, seed: int) -> list[Lesson]:
    """The jobs of the set `name`, `teach` or `probe`."""
    variants, part = {"teach": (TAUGHT_VARIANTS, "teacher"), "probe": (SCORED_VARIANTS, "distill")}[name]
    voices = draw_voices(variants, num_voices, np.random.default_rng(seed))
    seeds = np.random.SeedSequence(seed).generate_state(num_voices)
    return [Lesson(v, i, part, num_utterances, int(s)) for i, (v, s) in enumerate(zip(voices, seeds, strict=True))]


def write_lessons(path: Path, lessons: list[Lesson], workers: int) -> None:
    """Speak `lessons` and write them as one .npz."""
    with ProcessPool(workers) as booth:
        recorded = booth.record(speak_lesson, lessons)
        takes = [take for takes in track(recorded, path.stem, total=len(lessons)) for take in takes]
    phone_names = sorted({phone for _, phones, _ in takes for phone in phones})
    index = {phone: i for i, phone in enumerate(phone_names)}
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(
            file,
            samples=np.concatenate([samples for samples, _, _ in takes]),
            phones=np.array([index[phone] for _, phones, _ in takes for phone in phones], dtype=np.int16),
            phone_names=np.array(phone_names),
            num_samples=np.array([len(samples) for samples, _, _ in takes]),
            num_frames=np.array([len(phones) for _, phones, _ in takes]),
            speaker=np.array([speaker for _, _, speaker in takes]),
        )
    hours = sum(len(samples) for samples, _, _ in takes) / SAMPLE_RATE_HZ / 3600
    click.echo(f"{path}: {len(takes)} utterances, {hours:.2f} h, {len(lessons)} voices, {len(phone_names)} phones")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/lessons"), show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--seed", default=20_240, show_default=True)
def main(out: Path, workers: int, seed: int) -> None:
    """Speak what the demo teacher is taught and probed with."""
    out.mkdir(parents=True, exist_ok=True)
    write_lessons(out / "teach.npz", plan_lessons("teach", 480, 18, seed), workers)
    write_lessons(out / "probe.npz", plan_lessons("probe", 40, 18, seed + 1), workers)


if __name__ == "__main__":
    main()
