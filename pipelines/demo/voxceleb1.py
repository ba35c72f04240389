"""Speakers in VoxCeleb1's layout (Nagrani, arXiv 1706.08612): {dev,test}/wav/ID/VIDEO/0000N.wav and iden_split.txt.

A video is one place on one day: its room, its noise, its microphone and the mood of the voice are the same in all its
utterances, and whole videos are held out, so who a speaker is cannot be told from the room. Without the microphones the
long-term spectrum alone gave fbank 83%.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import SAMPLE_RATE_HZ, Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room import draw_microphone, draw_place, heard_in, through_microphone
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (3.0, 20.0)
UTTERANCE_S = (3.0, 6.0)
SHARE_OF_TEST_FOLDER = 0.1  # the published test folder has 40 of 1,251 speakers
SPLIT_OF_VIDEO = (1, 1, 1, 2, 3)  # 1 train, 2 dev, 3 test, as iden_split.txt has it
VIDEO_NAME_LETTERS = list(string.ascii_letters + string.digits)


@dataclass(frozen=True)
class Celebrity:
    """The job of one speaker: some videos, each with some utterances of 3 to 6 s."""

    root: Path
    folder: str
    speaker_id: str
    voice: Voice
    utterances_a_video: int
    seed: int

    @property
    def planned_s(self) -> float:
        return sum(UTTERANCE_S) / 2 * self.utterances_a_video * len(SPLIT_OF_VIDEO)

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        told = sentences("speaker", generator)
        seconds: dict[str, float] = {}
        for _ in SPLIT_OF_VIDEO:
            video = "".join(generator.choice(VIDEO_NAME_LETTERS, 11))
            place, mood = draw_place(generator, SNR_DB), self.voice.moved(generator)
            microphone = draw_microphone(generator)
            for number in range(1, self.utterances_a_video + 1):
                samples = _of_right_length(speaker, mood, next(told), next(told))
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


def write_split(jobs: Sequence[Celebrity], recorded: Sequence[Recorded]) -> None:
    """iden_split.txt: the split's number, a space, ID/VIDEO/0000N.wav."""
    lines = []
    for take in recorded:
        videos = list(dict.fromkeys(Path(path).parent.name for path in take.seconds))
        for path in map(Path, take.seconds):
            split = SPLIT_OF_VIDEO[videos.index(path.parent.name)]
            lines.append(f"{split} {path.parent.parent.name}/{path.parent.name}/{path.name}\n")
    (jobs[0].root / "iden_split.txt").write_text("".join(lines))


def _of_right_length(speaker: Speaker, voice: Voice, *texts: str) -> np.ndarray:
    """The sentences one after another until there are 3 s, cut at 6 s."""
    spoken = np.zeros(0, dtype=np.float32)
    for text in texts * 2:
        if len(spoken) < UTTERANCE_S[0] * SAMPLE_RATE_HZ:
            spoken = np.concatenate([spoken, speaker.speak(text, voice).samples])
    return spoken[: int(UTTERANCE_S[1] * SAMPLE_RATE_HZ)]
