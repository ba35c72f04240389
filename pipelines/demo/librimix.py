"""Two speakers at once, in the layout of LibriMix (Cosentino, arXiv 2005.11262) with SUPERB's Kaldi data folders.

    Libri2Mix/wav16k/max/{train-100,dev,test}/{mix_both,s1,s2}/MIXTURE.wav
    data/{train,dev,test}/{wav.scp,segments,utt2spk,spk2utt,rttm,reco2dur}

As in `max`, both sources begin with the file and the shorter one is padded. Each says one or two sentences with pauses
between, so a mixture has silence, one voice, the other, and both. Who speaks when is the synthesiser's own time line;
SUPERB takes it from forced alignments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import SAMPLE_RATE_HZ, Phone, Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import MAX_PEAK, coloured_noise, draw_place, heard_in
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (10.0, 25.0)
PAUSE_S = (0.2, 1.5)  # before each sentence
SENTENCES = (1, 2)
GAP_S = 0.2  # a shorter pause is part of the turn
LEVEL_DB = (-33.0, -25.0)  # of a source, as LibriMix draws them (there as loudness)
WAVES = Path("Libri2Mix", "wav16k", "max")
# subset -> folder of data/, part of the sentences
SUBSETS = {"train-100": ("train", "train"), "dev": ("dev", "dev"), "test": ("test", "test")}


@dataclass(frozen=True)
class Reader:
    """One speaker of a mixture."""

    speaker_id: int
    voice: Voice


@dataclass(frozen=True)
class Mixture:
    """The job of one mixture: two readers, each alone (s1, s2) and both in noise (mix_both); its turns as RTTM."""

    root: Path
    subset: str
    number: int
    readers: tuple[Reader, Reader]
    seed: int
    planned_s: float = 18.0  # three files of about 6 s

    @property
    def name(self) -> str:
        return "_".join(f"{reader.speaker_id}-{reader.speaker_id * 100}-{self.number:04d}" for reader in self.readers)

    @property
    def wave(self) -> Path:
        """The file that is diarised, below the root."""
        return WAVES / self.subset / "mix_both" / f"{self.name}.wav"

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        told = sentences(SUBSETS[self.subset][1], generator)
        dry, turns = [], []
        for reader in self.readers:
            texts = [next(told) for _ in range(generator.integers(SENTENCES[0], SENTENCES[1] + 1))]
            samples, phones = _say(speaker, reader.voice.moved(generator), texts, generator)
            dry.append(samples)
            turns += [(reader.speaker_id, *turn) for turn in turns_of(phones)]
        longest = max(map(len, dry))
        sources = []
        for samples in dry:
            place = replace(draw_place(generator, SNR_DB), snr_db=np.inf, level_db=float(generator.uniform(*LEVEL_DB)))
            sources.append(heard_in(np.pad(samples, (0, longest - len(samples))), place, generator))
        speech = np.sum(sources, axis=0)
        room = draw_place(generator, SNR_DB)
        noise = (
            coloured_noise(longest, room.colour, generator) * np.sqrt(np.mean(speech**2)) * 10 ** (-room.snr_db / 20)
        )
        waves = {"s1": sources[0], "s2": sources[1], "mix_both": speech + noise}
        loudness = min(1.0, MAX_PEAK / max(float(np.abs(wave).max()) for wave in waves.values()))
        seconds = {
            str(path): write_audio(self.root / path, wave * loudness)
            for kind, wave in waves.items()
            for path in [WAVES / self.subset / kind / f"{self.name}.wav"]
        }
        lines = [
            f"SPEAKER {self.name} 1 {start:.3f} {end - start:.3f} <NA> <NA> {who} <NA> <NA>"
            for who, start, end in turns
        ]
        return Recorded(seconds, tuple(lines))


def plan_mixtures(
    root: Path, num_mixtures: tuple[int, int, int], num_speakers: int, scale: float, seed: int
) -> list[Mixture]:
    """The jobs: mixtures of train, dev and test by speakers of their own, for dev and test half as many."""
    speakers = (num_speakers, num_speakers // 2, num_speakers // 2)
    counts = {subset: scaled(count, scale, least=3) for subset, count in zip(SUBSETS, speakers, strict=True)}
    voices = iter(draw_voices(SCORED_VARIANTS, sum(counts.values()), np.random.default_rng(seed)))
    ids = iter(range(2001, 2001 + sum(counts.values())))
    readers = {subset: [Reader(next(ids), next(voices)) for _ in range(count)] for subset, count in counts.items()}
    generator = np.random.default_rng([seed, 1])
    drawn = [
        (subset, number, [readers[subset][place] for place in generator.permutation(counts[subset])[:2]])
        for subset, count in zip(SUBSETS, num_mixtures, strict=True)
        for number in range(scaled(count, scale, least=2))
    ]
    return [
        Mixture(root, subset, number, (pair[0], pair[1]), job_seed)
        for (subset, number, pair), job_seed in zip(drawn, spawn_seeds(seed, len(drawn)), strict=True)
    ]


def write_kaldi(jobs: Sequence[Mixture], recorded: Sequence[Recorded]) -> None:
    """data/{train,dev,test}: Kaldi's data folder of each subset, one segment a turn, sorted as Kaldi wants it."""
    for subset, (folder, _) in SUBSETS.items():
        tables: dict[str, list[str]] = defaultdict(list)
        spoken: dict[str, list[str]] = defaultdict(list)
        for job, take in zip(jobs, recorded, strict=True):
            if job.subset != subset:
                continue
            tables["wav.scp"].append(f"{job.name} {job.wave}")
            tables["reco2dur"].append(f"{job.name} {take.seconds[str(job.wave)]:.3f}")
            for line in take.notes:
                fields = line.split()
                speaker, start_s, duration_s = fields[7], float(fields[3]), float(fields[4])
                end_s = start_s + duration_s
                turn = f"{speaker}_{job.name}_{round(start_s * 1000):06d}_{round(end_s * 1000):06d}"
                tables["rttm"].append(line)
                tables["segments"].append(f"{turn} {job.name} {start_s:.3f} {end_s:.3f}")
                tables["utt2spk"].append(f"{turn} {speaker}")
                spoken[speaker].append(turn)
        tables["spk2utt"] = [f"{speaker} {' '.join(sorted(turns))}" for speaker, turns in spoken.items()]
        place = jobs[0].root / "data" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            (place / name).write_text("".join(f"{line}\n" for line in (lines if name == "rttm" else sorted(lines))))


def turns_of(phones: Iterable[Phone]) -> list[tuple[float, float]]:
    """Phones in order -> stretches of speech in seconds; pauses up to GAP_S belong to the stretch around them."""
    turns: list[tuple[float, float]] = []
    for phone in phones:
        if phone.name.startswith("_"):
            continue
        start_s, end_s = phone.start / SAMPLE_RATE_HZ, phone.end / SAMPLE_RATE_HZ
        if turns and start_s - turns[-1][1] <= GAP_S:
            turns[-1] = (turns[-1][0], end_s)
        else:
            turns.append((start_s, end_s))
    return turns


def _say(
    speaker: Speaker, voice: Voice, texts: list[str], generator: np.random.Generator
) -> tuple[np.ndarray, list[Phone]]:
    """The sentences one after another, a pause before each: float32 (n,), and the phones on that time line."""
    pieces, phones, told = [], [], 0
    for text in texts:
        pause = int(generator.uniform(*PAUSE_S) * SAMPLE_RATE_HZ)
        speech = speaker.speak(text, voice)
        phones += [replace(p, start=p.start + told + pause, end=p.end + told + pause) for p in speech.phones]
        pieces += [np.zeros(pause, dtype=np.float32), speech.samples]
        told += pause + len(speech.samples)
    return np.concatenate(pieces), phones
