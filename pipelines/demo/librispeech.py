"""Corpora in LibriSpeech's layout (openslr.org/12).

    LibriSpeech/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-0000.flac, SPEAKER-CHAPTER.trans.txt
    LibriSpeech/SPEAKERS.TXT, CHAPTERS.TXT and beside it librispeech-lexicon.txt (openslr.org/11)

Two corpora have it: the scored one (PR, ASR) and the one that students are distilled on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.lexicon import arpabet, lexicon_text
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import apply_random_room
from pipelines.demo.sentences import VOCABULARY, sentences
from pipelines.demo.voices import Voice, draw_voices

SNR_DB = (6.0, 25.0)
CHAPTERS_A_SPEAKER = 2
FEWEST_SPEAKERS = 2  # of a subset, at any scale
SHORTEST_READING_S = 10.0  # of a speaker, at any scale


@dataclass(frozen=True)
class Subset:
    """One subset: the part of the sentences that it uses, its speakers, and the audio of each in seconds."""

    name: str
    part: str
    num_speakers: int
    seconds_a_speaker: float


@dataclass(frozen=True, kw_only=True)
class ReadingSpeaker(RecordingJob):
    """One speaker: chapters of sentences, each sentence in a room of its own."""

    subset: str
    part: str
    speaker_id: int
    voice: Voice
    reading_s: float

    @property
    def chapters(self) -> list[int]:
        """Numbers of the speaker's chapters."""
        return [self.speaker_id * 100 + number for number in range(1, CHAPTERS_A_SPEAKER + 1)]

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        texts = sentences(self.part, generator)
        recorded = Recorded()
        for chapter in self.chapters:
            folder = Path("LibriSpeech", self.subset, str(self.speaker_id), str(chapter))
            transcript: list[str] = []
            chapter_s = 0.0
            while chapter_s < self.reading_s / CHAPTERS_A_SPEAKER:
                text = next(texts)
                name = f"{self.speaker_id}-{chapter}-{len(transcript):04d}"
                speech = synthesiser.synthesise(text, self.voice.varied(generator))
                samples = apply_random_room(speech.samples, SNR_DB, generator)
                chapter_s += recorded.write(self.root, folder / f"{name}.flac", samples)
                transcript.append(f"{name} {text.upper()}\n")
            (self.root / folder / f"{self.speaker_id}-{chapter}.trans.txt").write_text("".join(transcript))
        return recorded


@dataclass(frozen=True, kw_only=True)
class LexiconJob(RecordingJob):
    """Job that writes librispeech-lexicon.txt for the whole vocabulary; it draws nothing."""

    seed: int = 0

    def record(self, synthesiser: Synthesiser) -> Recorded:
        pronunciations = {word: arpabet(word, synthesiser.pronounce(word)) for word in VOCABULARY}
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "librispeech-lexicon.txt").write_text(lexicon_text(pronunciations))
        return Recorded()


def plan_readings(
    root: Path, subsets: Sequence[Subset], variants: list[str], first_speaker_id: int, scale: float, seed: int
) -> list[ReadingSpeaker]:
    """Return the jobs of one corpus; every speaker has a voice of their own and belongs to one subset."""
    counts = [scaled(subset.num_speakers, scale, least=FEWEST_SPEAKERS) for subset in subsets]
    voices = draw_voices(variants, sum(counts), np.random.default_rng(seed))
    subset_of = [subset for subset, count in zip(subsets, counts, strict=True) for _ in range(count)]
    return [
        ReadingSpeaker(
            root=root,
            seed=job_seed,
            subset=subset.name,
            part=subset.part,
            speaker_id=speaker_id,
            voice=voice,
            reading_s=_reading_s(subset, scale),
        )
        for speaker_id, (subset, voice, job_seed) in enumerate(
            zip(subset_of, voices, spawn_seeds(seed, sum(counts)), strict=True), start=first_speaker_id
        )
    ]


def write_tables(jobs: Sequence[RecordingJob], recorded: Sequence[Recorded]) -> None:
    """Write SPEAKERS.TXT and CHAPTERS.TXT beside the subsets, with the published columns."""
    speakers = [";ID  |SEX| SUBSET           |MINUTES| NAME\n"]
    chapters = [";ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE\n"]
    for job, files in zip(jobs, recorded, strict=True):
        if not isinstance(job, ReadingSpeaker):  # the lexicon
            continue
        sex = "F" if job.voice.pitch > 50 else "M"
        name = f"espeak-ng en-us+{job.voice.variant} pitch {job.voice.pitch}"
        minutes = sum(files.seconds.values()) / 60
        speakers.append(f"{job.speaker_id:<5}| {sex} | {job.subset:<17}| {minutes:5.2f} | {name}\n")
        for chapter in job.chapters:
            minutes = sum(s for path, s in files.seconds.items() if Path(path).parent.name == str(chapter)) / 60
            chapters.append(
                f"{chapter:<7}|{job.speaker_id:<6}|{minutes:5.2f}  | {job.subset:<17}| 0    | 0     "
                f"| Sentences | Grammar\n"
            )
    folder = jobs[0].root / "LibriSpeech"
    (folder / "SPEAKERS.TXT").write_text("".join(speakers))
    (folder / "CHAPTERS.TXT").write_text("".join(chapters))


def _reading_s(subset: Subset, scale: float) -> float:
    """Return the seconds of each speaker; a scale below the fewest speakers shortens them instead."""
    share = min(1.0, subset.num_speakers * scale / FEWEST_SPEAKERS)
    return max(SHORTEST_READING_S, subset.seconds_a_speaker * share)
