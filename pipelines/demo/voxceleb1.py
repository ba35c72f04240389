"""Speakers in VoxCeleb1's layout (Nagrani, arXiv 1706.08612): {dev,test}/wav/ID/VIDEO/0000N.wav and its lists.

There are two corpora: one for speaker identification (iden_split.txt), and a smaller one for speaker verification
(veri_test2.txt) with a larger share of its speakers in test/.

All utterances of a video share one room, noise, microphone and variation of the voice, and whole videos are held out,
so that the room does not identify the speaker. Without the microphones, the long-term spectrum alone gave fbank an
accuracy of 83%.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import SAMPLE_RATE_HZ, apply_microphone, apply_room, draw_microphone, draw_room
from pipelines.demo.sentences import sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (3.0, 20.0)
SNR_CHANGE_DB = 2.0  # of an utterance, relative to its video
UTTERANCE_S = (3.0, 6.0)  # shortest, longest
VERIFIED_UTTERANCE_S = (2.5, 3.5)
VERIFIED_VIDEOS, VERIFIED_UTTERANCES_A_VIDEO = 3, 2
SHARE_OF_TEST_FOLDER = 0.1  # the published test folder has 40 of 1,251 speakers
SPLIT_OF_VIDEO = (1, 1, 1, 2, 3)  # 1 train, 2 dev, 3 test, as in iden_split.txt
VIDEO_NAME_LETTERS = list(string.ascii_letters + string.digits)


@dataclass(frozen=True, kw_only=True)
class VideoSpeaker(RecordingJob):
    """One speaker: videos of some utterances, each of a length in `utterance_s` (shortest, longest)."""

    folder: str
    speaker_id: str
    voice: Voice
    num_videos: int
    utterances_a_video: int
    utterances_of_last: int  # of the last video, which is test in iden_split.txt
    utterance_s: tuple[float, float]

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        texts = sentences("speaker", generator)
        recorded = Recorded()
        for video in range(1, self.num_videos + 1):
            name = "".join(generator.choice(VIDEO_NAME_LETTERS, 11))
            room, voice = draw_room(generator, SNR_DB), self.voice.varied(generator)
            microphone = draw_microphone(generator)
            count = self.utterances_of_last if video == self.num_videos else self.utterances_a_video
            for number in range(1, count + 1):
                speech = self._utterance(synthesiser, voice, [next(texts), next(texts)])
                snr_db = room.snr_db + generator.uniform(-SNR_CHANGE_DB, SNR_CHANGE_DB)
                samples = apply_microphone(apply_room(speech, replace(room, snr_db=snr_db), generator), microphone)
                recorded.write(self.root, Path(self.folder, "wav", self.speaker_id, name, f"{number:05d}.wav"), samples)
        return recorded

    def _utterance(self, synthesiser: Synthesiser, voice: Voice, texts: list[str]) -> np.ndarray:
        """Synthesise sentences, repeated if need be, until the shortest length is reached; cut at the longest."""
        shortest, longest = (round(seconds * SAMPLE_RATE_HZ) for seconds in self.utterance_s)
        samples = np.zeros(0, dtype=np.float32)
        for text in texts * 2:
            if len(samples) < shortest:
                samples = np.concatenate([samples, synthesiser.synthesise(text, voice).samples])
        return samples[:longest]


def plan_identification(
    root: Path, num_speakers: int, utterances_a_video: int, utterances_of_last: int, scale: float, seed: int
) -> list[VideoSpeaker]:
    """Return the jobs; the last tenth of the speakers is in test/, as in the published archive.

    utterances_of_last: of the last video, which is the test split; 0: as many as of any other.
    """
    count = scaled(num_speakers, scale, least=4)
    num_dev = count - max(1, round(count * SHARE_OF_TEST_FOLDER))
    utterances = utterances_a_video, utterances_of_last or utterances_a_video
    return _plan(root, count, num_dev, 10_001, len(SPLIT_OF_VIDEO), utterances, UTTERANCE_S, seed)


def plan_verification(root: Path, num_training: int, num_test: int, scale: float, seed: int) -> list[VideoSpeaker]:
    """Return the jobs: speakers of dev/, and others of test/, who are in the trials."""
    num_dev, num_test = scaled(num_training, scale, least=10), scaled(num_test, scale, least=3)
    return _plan(
        root, num_dev + num_test, num_dev, 11_001,
        VERIFIED_VIDEOS, (VERIFIED_UTTERANCES_A_VIDEO,) * 2, VERIFIED_UTTERANCE_S, seed,
    )  # fmt: skip


def _plan(
    root: Path, count: int, num_dev: int, first_id: int, num_videos: int, utterances: tuple[int, int],
    utterance_s: tuple[float, float], seed: int,
) -> list[VideoSpeaker]:  # fmt: skip
    """Return `count` jobs, the first `num_dev` of them in dev/. utterances: of a video, and of the last one."""
    voices = draw_voices(SCORED_VARIANTS, count, np.random.default_rng(seed))
    return [
        VideoSpeaker(
            root=root,
            seed=job_seed,
            folder="dev" if index < num_dev else "test",
            speaker_id=f"id{first_id + index}",
            voice=voice,
            num_videos=num_videos,
            utterances_a_video=utterances[0],
            utterances_of_last=utterances[1],
            utterance_s=utterance_s,
        )
        for index, (voice, job_seed) in enumerate(zip(voices, spawn_seeds(seed, count), strict=True))
    ]


def write_trials(jobs: Sequence[RecordingJob], recorded: Sequence[Recorded]) -> None:
    """Write veri_test2.txt: `1 PATH PATH` for every pair of one speaker's videos, as many `0 PATH PATH` of two.

    The impostors are evenly spaced over all pairs of two speakers.
    """
    paths = [Path(*Path(path).parts[2:]) for one in recorded for path in one.seconds if path.startswith("test/")]
    pairs = list(itertools.combinations(paths, 2))  # of ID/VIDEO/0000N.wav
    targets = [(a, b) for a, b in pairs if a.parts[0] == b.parts[0] and a.parts[1] != b.parts[1]]
    impostors = [(a, b) for a, b in pairs if a.parts[0] != b.parts[0]]
    spaced = np.linspace(0, len(impostors) - 1, len(targets)).round().astype(int)
    trials = [(1, *pair) for pair in targets] + [(0, *impostors[number]) for number in spaced]
    lines = sorted((f"{target} {a} {b}\n" for target, a, b in trials), key=lambda line: line[2:])
    (jobs[0].root / "veri_test2.txt").write_text("".join(lines))


def write_split(jobs: Sequence[RecordingJob], recorded: Sequence[Recorded]) -> None:
    """Write iden_split.txt: the number of the split, a space, ID/VIDEO/0000N.wav."""
    lines = []
    for one in recorded:
        videos = list(dict.fromkeys(Path(path).parent.name for path in one.seconds))  # in order of writing
        for path in map(Path, one.seconds):
            split = SPLIT_OF_VIDEO[videos.index(path.parent.name)]
            lines.append(f"{split} {Path(*path.parts[-3:])}\n")
    (jobs[0].root / "iden_split.txt").write_text("".join(lines))
