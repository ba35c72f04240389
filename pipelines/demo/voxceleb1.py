"""Speakers in VoxCeleb1's layout (Nagrani, arXiv 1706.08612): {dev,test}/wav/ID/VIDEO/0000N.wav and its lists.

There are two such trees: one to identify speakers (iden_split.txt), and a smaller one to verify them (veri_test2.txt)
with a larger share of its speakers in test/.

A video is one place on one day: its room, its noise, its microphone and the mood of the voice are the same in all its
utterances, and whole videos are held out, so who a speaker is cannot be told from the room. Without the microphones the
long-term spectrum alone gave fbank 83%.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import SAMPLE_RATE_HZ, Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import draw_microphone, draw_place, heard_in, through_microphone
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (3.0, 20.0)
UTTERANCE_S = (3.0, 6.0)
VERIFIED_UTTERANCE_S = (2.5, 3.5)
VERIFIED_VIDEOS, VERIFIED_UTTERANCES_A_VIDEO = 3, 2
SHARE_OF_TEST_FOLDER = 0.1  # the published test folder has 40 of 1,251 speakers
SPLIT_OF_VIDEO = (1, 1, 1, 2, 3)  # 1 train, 2 dev, 3 test, as iden_split.txt has it
VIDEO_NAME_LETTERS = list(string.ascii_letters + string.digits)


@dataclass(frozen=True)
class Celebrity:
    """The job of one speaker: some videos, each with some utterances, of so many seconds at least and at most."""

    root: Path
    folder: str
    speaker_id: str
    voice: Voice
    utterances_a_video: int
    seed: int
    videos: int = len(SPLIT_OF_VIDEO)
    utterance_s: tuple[float, float] = UTTERANCE_S

    @property
    def planned_s(self) -> float:
        return sum(self.utterance_s) / 2 * self.utterances_a_video * self.videos

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        told = sentences("speaker", generator)
        seconds: dict[str, float] = {}
        for _ in range(self.videos):
            video = "".join(generator.choice(VIDEO_NAME_LETTERS, 11))
            place, mood = draw_place(generator, SNR_DB), self.voice.moved(generator)
            microphone = draw_microphone(generator)
            for number in range(1, self.utterances_a_video + 1):
                samples = _of_right_length(self.utterance_s, speaker, mood, next(told), next(told))
                heard = heard_in(samples, replace(place, snr_db=place.snr_db + generator.uniform(-2, 2)), generator)
                path = Path(self.folder, "wav", self.speaker_id, video, f"{number:05d}.wav")
                seconds[str(path)] = write_audio(self.root / path, through_microphone(heard, microphone))
        return Recorded(seconds)


def plan_celebrities(
    root: Path, num_speakers: int, utterances_a_video: int, scale: float, seed: int
) -> list[Celebrity]:
    """The jobs; the last tenth of the speakers lies in test/, as in the published archive."""
    count = scaled(num_speakers, scale, least=4)
    first_of_test = count - max(1, round(count * SHARE_OF_TEST_FOLDER))
    voices = draw_voices(SCORED_VARIANTS, count, np.random.default_rng(seed))
    return [
        Celebrity(
            root,
            "test" if i >= first_of_test else "dev",
            f"id{10_001 + i}",
            voice,
            utterances_a_video,
            job_seed,
        )
        for i, (voice, job_seed) in enumerate(zip(voices, spawn_seeds(seed, count), strict=True))
    ]


def plan_trials(root: Path, num_training: int, num_test: int, scale: float, seed: int) -> list[Celebrity]:
    """The jobs of the tree whose speakers are verified: speakers of dev/, and others of test/."""
    in_dev, in_test = scaled(num_training, scale, least=10), scaled(num_test, scale, least=3)
    voices = draw_voices(SCORED_VARIANTS, in_dev + in_test, np.random.default_rng(seed))
    seeds = spawn_seeds(seed, in_dev + in_test)
    return [
        Celebrity(
            root,
            "dev" if i < in_dev else "test",
            f"id{11_001 + i}",
            voice,
            VERIFIED_UTTERANCES_A_VIDEO,
            job_seed,
            VERIFIED_VIDEOS,
            VERIFIED_UTTERANCE_S,
        )
        for i, (voice, job_seed) in enumerate(zip(voices, seeds, strict=True))
    ]


def write_trials(jobs: Sequence[Celebrity], recorded: Sequence[Recorded]) -> None:
    """veri_test2.txt: `1 PATH PATH` for every pair of one speaker's videos, as many `0 PATH PATH` of two speakers.

    The impostors are evenly spaced over all pairs of two speakers.
    """
    paths = [Path(*Path(path).parts[2:]) for take in recorded for path in take.seconds if path.startswith("test/")]
    pairs = list(itertools.combinations(paths, 2))
    targets = [(a, b) for a, b in pairs if a.parts[0] == b.parts[0] and a.parts[1] != b.parts[1]]
    impostors = [(a, b) for a, b in pairs if a.parts[0] != b.parts[0]]
    spaced = np.linspace(0, len(impostors) - 1, len(targets)).round().astype(int)
    trials = [(1, *pair) for pair in targets] + [(0, *impostors[number]) for number in spaced]
    lines = sorted((f"{target} {a} {b}\n" for target, a, b in trials), key=lambda line: line[2:])
    (jobs[0].root / "veri_test2.txt").write_text("".join(lines))


def write_split(jobs: Sequence[Celebrity], recorded: Sequence[Recorded]) -> None:
    """iden_split.txt: the split's number, a space, ID/VIDEO/0000N.wav."""
    lines = []
    for take in recorded:
        videos = list(dict.fromkeys(Path(path).parent.name for path in take.seconds))
        for path in map(Path, take.seconds):
            split = SPLIT_OF_VIDEO[videos.index(path.parent.name)]
            lines.append(f"{split} {path.parent.parent.name}/{path.parent.name}/{path.name}\n")
    (jobs[0].root / "iden_split.txt").write_text("".join(lines))


def _of_right_length(utterance_s: tuple[float, float], speaker: Speaker, voice: Voice, *texts: str) -> np.ndarray:
    """The sentences one after another until there are `utterance_s[0]` seconds, cut at `utterance_s[1]`."""
    spoken = np.zeros(0, dtype=np.float32)
    for text in texts * 2:
        if len(spoken) < utterance_s[0] * SAMPLE_RATE_HZ:
            spoken = np.concatenate([spoken, speaker.speak(text, voice).samples])
    return spoken[: int(utterance_s[1] * SAMPLE_RATE_HZ)]
