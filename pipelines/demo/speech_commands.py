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

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import SAMPLE_RATE_HZ, apply_random_room, coloured_noise
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices, more_voices

KEYWORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
UNKNOWN_WORDS = ["bed", "bird", "cat", "dog", "happy", "house", "marvin", "nine", "sheila", "tree", "wow", "zero"]
UNKNOWN_A_SPEAKER = 3
SILENCES_A_SPEAKER = 2  # in the test archive alone
SNR_DB = (0.0, 20.0)
CLIP_SAMPLES = SAMPLE_RATE_HZ  # one second
# The published names -> colour and level in dB relative to full scale
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
    """Return the split of a file by the published rule: all files of one speaker's hash are in one split.

    Source: `which_set` in the data set's README and in TensorFlow's input_data.py.
    """
    speaker_hash = re.sub(r"_nohash_.*$", "", Path(file_name).name)
    most = 2**27 - 1  # the published MAX_NUM_WAVS_PER_CLASS
    percent = int(hashlib.sha1(speaker_hash.encode()).hexdigest(), 16) % (most + 1) * (100.0 / most)
    if percent < validation_percent:
        return "validation"
    return "testing" if percent < validation_percent + testing_percent else "train"


@dataclass(frozen=True, kw_only=True)
class KeywordSpeaker(RecordingJob):
    """One speaker: every keyword once and a few other words; in the test archive also two silences."""

    archive: str
    speaker_hash: str
    voice: Voice

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        others = [str(word) for word in generator.choice(UNKNOWN_WORDS, UNKNOWN_A_SPEAKER, replace=False)]
        recorded = Recorded()
        for word in KEYWORDS + others:
            speech = synthesiser.synthesise(word, self.voice.varied(generator))
            clip = apply_random_room(_place_in_clip(speech.samples, generator), SNR_DB, generator)
            recorded.write(self.root, self._path(word), clip)
        if self.archive == TEST_FOLDER:
            for number in range(SILENCES_A_SPEAKER):
                path = Path(self.archive, "_silence_", f"{self.speaker_hash}_nohash_{number}.wav")
                recorded.write(self.root, path, _silence(generator))
        return recorded

    def _path(self, word: str) -> Path:
        folder, number = word, 0
        if self.archive == TEST_FOLDER and word in UNKNOWN_WORDS:  # one folder for all of them, so numbered by word
            folder, number = "_unknown_", UNKNOWN_WORDS.index(word)
        return Path(self.archive, folder, f"{self.speaker_hash}_nohash_{number}.wav")


@dataclass(frozen=True, kw_only=True)
class BackgroundNoise(RecordingJob):
    """One file of _background_noise_."""

    name: str

    def record(self, synthesiser: Synthesiser) -> Recorded:
        colour, level_db = BACKGROUND_NOISES[self.name]
        noise = coloured_noise(int(BACKGROUND_S * SAMPLE_RATE_HZ), colour, np.random.default_rng(self.seed))
        recorded = Recorded()
        path = Path(TRAIN_FOLDER, "_background_noise_", f"{self.name}.wav")
        recorded.write(self.root, path, noise * 10 ** (level_db / 20))
        return recorded


def plan_keywords(
    root: Path, num_speakers: int, num_test_speakers: int, num_more: int, scale: float, seed: int
) -> list[RecordingJob]:
    """Return the jobs; hashes are drawn until each split of the main archive has its share of the speakers.

    num_more: further speakers of the test archive, who leave all other files as they are.
    """
    generator = np.random.default_rng(seed)
    num_main, num_test = scaled(num_speakers, scale, least=4), scaled(num_test_speakers, scale, least=2)
    num_more = scaled(num_more, scale, least=0)
    voices = draw_voices(SCORED_VARIANTS, num_main + num_test, generator)
    hashes = _draw_hashes(num_main, generator) + [_draw_hash(generator) for _ in range(num_test)]
    archives = [TRAIN_FOLDER] * num_main + [TEST_FOLDER] * num_test
    seeds = iter(spawn_seeds(seed, num_main + num_test + len(BACKGROUND_NOISES) + num_more))
    return [
        *(
            KeywordSpeaker(root=root, seed=next(seeds), archive=archive, speaker_hash=speaker_hash, voice=voice)
            for archive, speaker_hash, voice in zip(archives, hashes, voices, strict=True)
        ),
        *(BackgroundNoise(root=root, seed=next(seeds), name=name) for name in BACKGROUND_NOISES),
        *(
            KeywordSpeaker(
                root=root, seed=next(seeds), archive=TEST_FOLDER, speaker_hash=_draw_hash(generator), voice=voice
            )
            for voice in more_voices(SCORED_VARIANTS, num_main + num_test, num_more, seed)
        ),
    ]


def write_lists(jobs: Sequence[RecordingJob], recorded: Sequence[Recorded]) -> None:
    """Write validation_list.txt and testing_list.txt of the main archive."""
    folder = f"{TRAIN_FOLDER}/"
    names = sorted(path.removeprefix(folder) for one in recorded for path in one.seconds if path.startswith(folder))
    words = [name for name in names if not name.startswith("_background_noise_")]
    for split in ("validation", "testing"):
        lines = "".join(f"{name}\n" for name in words if which_set(name) == split)
        (jobs[0].root / TRAIN_FOLDER / f"{split}_list.txt").write_text(lines)


def _draw_hashes(count: int, generator: np.random.Generator) -> list[str]:
    """Draw speaker hashes by rejection until every split has its number of speakers, at least one."""
    wanted = {split: max(1, round(share * count)) for split, share in SPLIT_SHARES.items()}
    wanted["train"] = count - wanted["validation"] - wanted["testing"]
    hashes: list[str] = []
    while len(hashes) < count:
        drawn = _draw_hash(generator)
        split = which_set(drawn)
        if wanted[split] > 0:
            wanted[split] -= 1
            hashes.append(drawn)
    return hashes


def _draw_hash(generator: np.random.Generator) -> str:
    return f"{int(generator.integers(2**32)):08x}"


def _place_in_clip(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Place the word at a random position in one second of silence; a longer one is cut at its end."""
    clip = np.zeros(CLIP_SAMPLES, dtype=np.float32)
    samples = samples[:CLIP_SAMPLES]
    start = int(generator.integers(CLIP_SAMPLES - len(samples) + 1))
    clip[start : start + len(samples)] = samples
    return clip


def _silence(generator: np.random.Generator) -> np.ndarray:
    """Return one second of a background noise, up to 15 dB below its level: float32 (CLIP_SAMPLES,)."""
    colour, level_db = list(BACKGROUND_NOISES.values())[int(generator.integers(len(BACKGROUND_NOISES)))]
    amplitude = 10 ** ((level_db + float(generator.uniform(-15, 0))) / 20)
    return coloured_noise(CLIP_SAMPLES, colour, generator) * amplitude
