"""Corpora in LibriSpeech's layout (openslr.org/12).

    LibriSpeech/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-0000.flac, SPEAKER-CHAPTER.trans.txt
    LibriSpeech/SPEAKERS.TXT, CHAPTERS.TXT and beside it librispeech-lexicon.txt (openslr.org/11)

Two corpora have it: the one that is scored (PR, ASR) and the one that students are distilled on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Speaker
from pipelines.demo.lexicon import arpabet, lexicon_text
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import draw_place, heard_in
from pipelines.demo.sentences import VOCABULARY, sentences
from pipelines.demo.voices import Voice, draw_voices

SNR_DB = (6.0, 25.0)
CHAPTERS_A_SPEAKER = 2


@dataclass(frozen=True)
class Subset:
    """One subset: the part of the sentences it may use, how many speakers, and how long each speaks."""

    name: str
    part: str
    num_speakers: int
    seconds_a_speaker: float


@dataclass(frozen=True)
class Reading:
    """The job of one speaker: chapters of sentences, in a place of its own for every sentence."""

    root: Path
    subset: str
    part: str
    speaker_id: int
    voice: Voice
    planned_s: float
    seed: int

    @property
    def chapters(self) -> list[int]:
        return [self.speaker_id * 100 + number for number in range(1, CHAPTERS_A_SPEAKER + 1)]

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        told = sentences(self.part, generator)
        seconds: dict[str, float] = {}
        for chapter in self.chapters:
            folder = Path("LibriSpeech", self.subset, str(self.speaker_id), str(chapter))
            transcript: list[str] = []
            spoken_s = 0.0
            while spoken_s < self.planned_s / CHAPTERS_A_SPEAKER:
                text = next(told)
                name = f"{self.speaker_id}-{chapter}-{len(transcript):04d}"
                speech = speaker.speak(text, self.voice.moved(generator))
                path = folder / f"{name}.flac"
                heard = heard_in(speech.samples, draw_place(generator, SNR_DB), generator)
                seconds[str(path)] = write_audio(self.root / path, heard)
                spoken_s += seconds[str(path)]
                transcript.append(f"{name} {text.upper()}\n")
            (self.root / folder / f"{self.speaker_id}-{chapter}.trans.txt").write_text("".join(transcript))
        return Recorded(seconds)


@dataclass(frozen=True)
class LexiconJob:
    """The job that writes librispeech-lexicon.txt for the whole vocabulary."""

    root: Path
    planned_s: float = 0.0

    def record(self, speaker: Speaker) -> Recorded:
        pronunciations = {word: arpabet(word, speaker.pronounce(word)) for word in VOCABULARY}
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "librispeech-lexicon.txt").write_text(lexicon_text(pronunciations))
        return Recorded({})


def plan_readings(
    root: Path,
    subsets: tuple[Subset, ...],
    variants: list[str],
    first_speaker_id: int,
    scale: float,
    seed: int,
) -> list[Reading]:
    """The jobs of one corpus; every speaker has a voice of their own and belongs to one subset."""
    counts = [scaled(subset.num_speakers, scale, least=2) for subset in subsets]
    voices = iter(draw_voices(variants, sum(counts), np.random.default_rng(seed)))
    seeds = iter(spawn_seeds(seed, sum(counts)))
    speaker_ids = iter(range(first_speaker_id, first_speaker_id + sum(counts)))
    return [
        Reading(
            root,
            subset.name,
            subset.part,
            next(speaker_ids),
            next(voices),
            _seconds(subset, scale),
            next(seeds),
        )
        for subset, count in zip(subsets, counts, strict=True)
        for _ in range(count)
    ]


def write_tables(jobs: Sequence[Reading | LexiconJob], recorded: Sequence[Recorded]) -> None:
    """SPEAKERS.TXT and CHAPTERS.TXT beside the subsets, with the published columns."""
    readings = [(job, take) for job, take in zip(jobs, recorded, strict=True) if isinstance(job, Reading)]
    speakers = [";ID  |SEX| SUBSET           |MINUTES| NAME\n"]
    chapters = [";ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE\n"]
    for reading, written in readings:
        sex = "F" if reading.voice.pitch > 50 else "M"
        name = f"espeak-ng en-us+{reading.voice.variant} pitch {reading.voice.pitch}"
        speakers.append(
            f"{reading.speaker_id:<5}| {sex} | {reading.subset:<17}| {written.total_s / 60:5.2f} | {name}\n"
        )
        for chapter in reading.chapters:
            minutes = sum(s for path, s in written.seconds.items() if Path(path).parent.name == str(chapter)) / 60
            chapters.append(
                f"{chapter:<7}|{reading.speaker_id:<6}|{minutes:5.2f}  | {reading.subset:<17}| 0    | 0     "
                f"| Sentences | Grammar\n"
            )
    folder = jobs[0].root / "LibriSpeech"
    (folder / "SPEAKERS.TXT").write_text("".join(speakers))
    (folder / "CHAPTERS.TXT").write_text("".join(chapters))


def _seconds(subset: Subset, scale: float) -> float:
    """Once a subset is down to its fewest speakers, a smaller scale shortens what each says, to 10 s at the least."""
    return max(10.0, subset.seconds_a_speaker * min(1.0, subset.num_speakers * scale / 2))
