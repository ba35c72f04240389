"""Keywords in the layout of Speech Commands v0.01 and its own test archive (Warden, arXiv 1804.03209).

speech_commands_v0.01/WORD/<speaker hash>_nohash_N.wav   validation_list.txt   testing_list.txt   _background_noise_/
speech_commands_test_set_v0.01/{ten words,_silence_,_unknown_}/*.wav
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import SAMPLE_RATE_HZ, Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import coloured_noise, draw_place, heard_in
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

KEYWORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
UNKNOWN_WORDS = ["bed", "bird", "cat", "dog", "happy", "house", "marvin", "nine", "sheila", "tree", "wow", "zero"]
UNKNOWN_A_SPEAKER = 3
SNR_DB = (0.0, 20.0)
CLIP_SAMPLES = SAMPLE_RATE_HZ
# name -> colour and level in dB; the names are the published ones
BACKGROUND_NOISES = {
    "doing_the_dishes": ("pink", -30.0),
    "dude_miaowing": ("brown", -36.0),
    "exercise_bike": ("brown", -26.0),
    "pink_noise": ("pink", -24.0),
    "running_tap": ("white", -32.0),
    "white_noise": ("white", -22.0),
}
BACKGROUND_S = 60.0
TRAIN_FOLDER, TEST_FOLDER = "speech_commands_v0.01", "speech_commands_test_set_v0.01"
SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "testing": 0.1}


def which_set(file_name: str, validation_percent: float = 10.0, testing_percent: float = 10.0) -> str:
    """The published rule: a speaker's hash decides the split, so all takes of one speaker lie in one.

    Source: `which_set` in the data set's README and in TensorFlow's input_data.py.
    """
    speaker_hash = re.sub(r"_nohash_.*$", "", Path(file_name).name)
    most = 2**27 - 1
    percent = int(hashlib.sha1(speaker_hash.encode()).hexdigest(), 16) % (most + 1) * (100.0 / most)
    if percent < validation_percent:
        return "validation"
    return "testing" if percent < validation_percent + testing_percent else "train"


@dataclass(frozen=True)
class KeywordSpeaker:
    """The job of one speaker: every keyword once, a few other words; in the test archive also one silence."""

    root: Path
    archive: str
    speaker_hash: str
    voice: Voice
    seed: int
    planned_s: float = float(len(KEYWORDS) + UNKNOWN_A_SPEAKER)

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        others = [str(word) for word in generator.choice(UNKNOWN_WORDS, UNKNOWN_A_SPEAKER, replace=False)]
        seconds: dict[str, float] = {}
        for word in KEYWORDS + others:
            speech = speaker.speak(word, self.voice.moved(generator))
            clip = heard_in(_one_second(speech.samples, generator), draw_place(generator, SNR_DB), generator)
            self._write(self._path(word), clip, seconds)
        if self.archive == TEST_FOLDER:
            for number in range(2):
                self._write(f"_silence_/{self.speaker_hash}_nohash_{number}.wav", _silence(generator), seconds)
        return Recorded(seconds)

    def _path(self, word: str) -> str:
        if self.archive == TEST_FOLDER and word in UNKNOWN_WORDS:
            return f"_unknown_/{self.speaker_hash}_nohash_{UNKNOWN_WORDS.index(word)}.wav"
        return f"{word}/{self.speaker_hash}_nohash_0.wav"

    def _write(self, name: str, clip: np.ndarray, seconds: dict[str, float]) -> None:
        path = Path(self.archive, name)
        seconds[str(path)] = write_audio(self.root / path, clip)


@dataclass(frozen=True)
class BackgroundNoise:
    """The job of one file of _background_noise_."""

    root: Path
    name: str
    seed: int
    planned_s: float = BACKGROUND_S

    def record(self, speaker: Speaker) -> Recorded:
        colour, level_db = BACKGROUND_NOISES[self.name]
        noise = coloured_noise(int(BACKGROUND_S * SAMPLE_RATE_HZ), colour, np.random.default_rng(self.seed))
        path = Path(TRAIN_FOLDER, "_background_noise_", f"{self.name}.wav")
        return Recorded({str(path): write_audio(self.root / path, noise * 10 ** (level_db / 20))})


def plan_keywords(
    root: Path, num_speakers: int, num_test_speakers: int, scale: float, seed: int
) -> list[KeywordSpeaker | BackgroundNoise]:
    """The jobs; hashes are drawn until each split of the main archive has its share of the speakers."""
    generator = np.random.default_rng(seed)
    num_main, num_test = scaled(num_speakers, scale, least=4), scaled(num_test_speakers, scale, least=2)
    voices = draw_voices(SCORED_VARIANTS, num_main + num_test, generator)
    hashes = _draw_hashes(num_main, generator) + [_hash(generator) for _ in range(num_test)]
    archives = [TRAIN_FOLDER] * num_main + [TEST_FOLDER] * num_test
    seeds = spawn_seeds(seed, num_main + num_test + len(BACKGROUND_NOISES))
    speakers = [
        KeywordSpeaker(root, archive, speaker_hash, voice, job_seed)
        for archive, speaker_hash, voice, job_seed in zip(archives, hashes, voices, seeds, strict=False)
    ]
    noises = [
        BackgroundNoise(root, name, job_seed)
        for name, job_seed in zip(BACKGROUND_NOISES, seeds[num_main + num_test :], strict=True)
    ]
    return [*speakers, *noises]


def write_lists(jobs: Sequence[KeywordSpeaker | BackgroundNoise], recorded: Sequence[Recorded]) -> None:
    """validation_list.txt and testing_list.txt of the main archive."""
    folder = f"{TRAIN_FOLDER}/"
    names = sorted(path.removeprefix(folder) for take in recorded for path in take.seconds if path.startswith(folder))
    spoken = [name for name in names if not name.startswith("_background_noise_")]
    for split in ("validation", "testing"):
        lines = "".join(f"{name}\n" for name in spoken if which_set(name) == split)
        (jobs[0].root / TRAIN_FOLDER / f"{split}_list.txt").write_text(lines)


def _draw_hashes(count: int, generator: np.random.Generator) -> list[str]:
    wanted = {split: max(1, round(share * count)) for split, share in SPLIT_SHARES.items()}
    wanted["train"] = count - wanted["validation"] - wanted["testing"]
    hashes: list[str] = []
    while len(hashes) < count:
        drawn = _hash(generator)
        split = which_set(drawn)
        if wanted[split] > 0:
            wanted[split] -= 1
            hashes.append(drawn)
    return hashes


def _hash(generator: np.random.Generator) -> str:
    return f"{int(generator.integers(2**32)):08x}"


def _one_second(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The word somewhere in one second; a longer one loses its end."""
    clip = np.zeros(CLIP_SAMPLES, dtype=np.float32)
    samples = samples[:CLIP_SAMPLES]
    start = int(generator.integers(CLIP_SAMPLES - len(samples) + 1))
    clip[start : start + len(samples)] = samples
    return clip


def _silence(generator: np.random.Generator) -> np.ndarray:
    colour, level_db = list(BACKGROUND_NOISES.values())[int(generator.integers(len(BACKGROUND_NOISES)))]
    loudness = 10 ** ((level_db + float(generator.uniform(-15, 0))) / 20)
    return coloured_noise(CLIP_SAMPLES, colour, generator) * loudness
