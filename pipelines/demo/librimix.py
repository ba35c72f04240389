"""Two simultaneous speakers in the layout of LibriMix (Cosentino, arXiv 2005.11262) with SUPERB's Kaldi data folders.

    Libri2Mix/wav16k/max/{train-100,dev,test}/{mix_both,s1,s2}/MIXTURE.wav
    data/{train,dev,test}/{wav.scp,segments,utt2spk,spk2utt,rttm,reco2dur}

As in `max`, both sources begin with the file and the shorter one is padded. Each has one or two sentences with pauses
between them, so a mixture has silence, one speaker, the other, and both. The turns come from the synthesiser's phone
times; SUPERB's come from forced alignments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Phone, Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import MAX_PEAK, SAMPLE_RATE_HZ, apply_room, coloured_noise, draw_room
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (10.0, 25.0)
PAUSE_S = (0.2, 1.5)  # before each sentence
NUM_SENTENCES = (1, 2)  # of a source
GAP_S = 0.2  # a shorter pause is part of the turn
LEVEL_DB = (-33.0, -25.0)  # of a source; LibriMix draws its loudness (LUFS) from this range
WAVES = Path("Libri2Mix", "wav16k", "max")
SPLITS = {"train-100": "train", "dev": "dev", "test": "test"}  # subset -> folder of data/ and part of the sentences


@dataclass(frozen=True)
class MixedSpeaker:
    """One speaker of a mixture."""

    speaker_id: int
    voice: Voice


@dataclass(frozen=True, kw_only=True)
class Mixture(RecordingJob):
    """One mixture: two speakers, each alone (s1, s2) and both in noise (mix_both); its turns as lines of RTTM."""

    subset: str
    number: int
    speakers: Sequence[MixedSpeaker]

    @property
    def name(self) -> str:
        """Name of the files without suffix, in the published form SPEAKER-CHAPTER-UTTERANCE_…"""
        return "_".join(f"{one.speaker_id}-{one.speaker_id * 100}-{self.number:04d}" for one in self.speakers)

    def path(self, kind: str) -> Path:
        """Return the path of a file below the root; `kind` is mix_both (the file that is diarised), s1 or s2."""
        return WAVES / self.subset / kind / f"{self.name}.wav"

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        texts = sentences(SPLITS[self.subset], generator)
        recorded = Recorded()
        dry: list[np.ndarray] = []  # float32 (n,) of each source, without room
        for one in self.speakers:
            some = [next(texts) for _ in range(generator.integers(NUM_SENTENCES[0], NUM_SENTENCES[1] + 1))]
            samples, phones = _speak_with_pauses(synthesiser, one.voice.varied(generator), some, generator)
            dry.append(samples)
            recorded.notes += [
                f"SPEAKER {self.name} 1 {start_s:.3f} {end_s - start_s:.3f} <NA> <NA> {one.speaker_id} <NA> <NA>"
                for start_s, end_s in turns_of(phones)
            ]
        for kind, samples in _mix(dry, generator).items():
            recorded.write(self.root, self.path(kind), samples)
        return recorded


def _mix(dry: list[np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return s1, s2 and mix_both, float (n,): each source in a room without noise, and their sum with noise."""
    longest = max(map(len, dry))
    sources = []
    for samples in dry:
        room = replace(draw_room(generator, SNR_DB), snr_db=np.inf, level_db=float(generator.uniform(*LEVEL_DB)))
        sources.append(apply_room(np.pad(samples, (0, longest - len(samples))), room, generator))
    speech = np.sum(sources, axis=0)
    room = draw_room(generator, SNR_DB)  # of the noise alone
    noise = coloured_noise(longest, room.colour, generator) * np.sqrt(np.mean(speech**2)) * 10 ** (-room.snr_db / 20)
    waves = {"s1": sources[0], "s2": sources[1], "mix_both": speech + noise}
    # One factor for all three: the mixture stays the sum of its sources.
    factor = min(1.0, MAX_PEAK / max(float(np.abs(wave).max()) for wave in waves.values()))
    return {kind: wave * factor for kind, wave in waves.items()}


def plan_mixtures(
    root: Path, num_mixtures: tuple[int, int, int], num_speakers: int, scale: float, seed: int
) -> list[Mixture]:
    """Return the jobs: mixtures of train, dev and test, each with its own speakers, half as many for dev and test."""
    wanted = (num_speakers, num_speakers // 2, num_speakers // 2)
    counts = {subset: scaled(count, scale, least=3) for subset, count in zip(SPLITS, wanted, strict=True)}
    voices = iter(draw_voices(SCORED_VARIANTS, sum(counts.values()), np.random.default_rng(seed)))
    ids = iter(range(2001, 2001 + sum(counts.values())))
    speakers = {subset: [MixedSpeaker(next(ids), next(voices)) for _ in range(n)] for subset, n in counts.items()}
    generator = np.random.default_rng([seed, 1])
    drawn = [
        (subset, number, [speakers[subset][index] for index in generator.permutation(counts[subset])[:2]])
        for subset, count in zip(SPLITS, num_mixtures, strict=True)
        for number in range(scaled(count, scale, least=2))
    ]
    return [
        Mixture(root=root, seed=job_seed, subset=subset, number=number, speakers=tuple(pair))
        for (subset, number, pair), job_seed in zip(drawn, spawn_seeds(seed, len(drawn)), strict=True)
    ]


def write_kaldi(jobs: Sequence[Mixture], recorded: Sequence[Recorded]) -> None:
    """Write the Kaldi data folders: sorted, but for the RTTM, which has the turns in order of time."""
    for subset, folder in SPLITS.items():
        tables: dict[str, list[str]] = defaultdict(list)
        turns_by: dict[str, list[str]] = defaultdict(list)
        for job, one in zip(jobs, recorded, strict=True):
            if job.subset != subset:
                continue
            path = str(job.path("mix_both"))
            tables["wav.scp"].append(f"{job.name} {path}")
            tables["reco2dur"].append(f"{job.name} {one.seconds[path]:.3f}")
            for line in one.notes:
                _, _, _, start, duration, _, _, speaker, *_ = line.split()
                start_s = float(start)
                end_s = start_s + float(duration)
                turn = f"{speaker}_{job.name}_{round(start_s * 1000):06d}_{round(end_s * 1000):06d}"  # in ms
                tables["rttm"].append(line)
                tables["segments"].append(f"{turn} {job.name} {start_s:.3f} {end_s:.3f}")
                tables["utt2spk"].append(f"{turn} {speaker}")
                turns_by[speaker].append(turn)
        tables["spk2utt"] = [f"{speaker} {' '.join(sorted(turns))}" for speaker, turns in turns_by.items()]
        data = jobs[0].root / "data" / folder
        data.mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            (data / name).write_text("".join(f"{line}\n" for line in (lines if name == "rttm" else sorted(lines))))


def turns_of(phones: Iterable[Phone]) -> list[tuple[float, float]]:
    """Return (start, end) of the turns in seconds: phones in order, joined across pauses of at most GAP_S."""
    turns: list[tuple[float, float]] = []
    for phone in phones:
        if phone.is_pause:
            continue
        start_s, end_s = phone.start / SAMPLE_RATE_HZ, phone.end / SAMPLE_RATE_HZ
        if turns and start_s - turns[-1][1] <= GAP_S:
            turns[-1] = (turns[-1][0], end_s)
        else:
            turns.append((start_s, end_s))
    return turns


def _speak_with_pauses(
    synthesiser: Synthesiser, voice: Voice, texts: list[str], generator: np.random.Generator
) -> tuple[np.ndarray, list[Phone]]:
    """Synthesise consecutive sentences, a pause before each: float32 (n,), and the phones with times in it."""
    pieces: list[np.ndarray] = []
    phones: list[Phone] = []
    for text in texts:
        pieces.append(np.zeros(int(generator.uniform(*PAUSE_S) * SAMPLE_RATE_HZ), dtype=np.float32))
        begin = sum(map(len, pieces))
        speech = synthesiser.synthesise(text, voice)
        phones += [replace(phone, start=phone.start + begin, end=phone.end + begin) for phone in speech.phones]
        pieces.append(speech.samples)
    return np.concatenate(pieces), phones
