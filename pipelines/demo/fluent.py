"""Spoken commands in the layout of Fluent Speech Commands (Lugosch, arXiv 1904.03670).

    fluent_speech_commands_dataset/wavs/speakers/SPEAKER/<uuid>.wav
    fluent_speech_commands_dataset/data/{train,valid,test}_data.csv

The 31 published intents, each in three phrasings. As in the published set, no speaker is in two splits, and all splits
have the same phrasings.
"""

from __future__ import annotations

import csv
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import apply_random_room
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices, more_voices

FOLDER = Path("fluent_speech_commands_dataset")
SNR_DB = (8.0, 25.0)
SHARE_OF_DEV, SHARE_OF_TEST = 0.15, 0.2  # published: 10 and 10 of 97 speakers
SPEAKER_LETTERS = list(string.ascii_letters + string.digits)
COLUMNS = ("", "path", "speakerId", "transcription", "action", "object", "location")
ROOMS = ("kitchen", "bedroom", "washroom")
# (action, object) -> phrasings; those with ROOM occur with and without a room
PHRASINGS = {
    ("activate", "lights"): ("turn on the lights ROOM", "switch the lights on ROOM", "lights on ROOM"),
    ("deactivate", "lights"): ("turn off the lights ROOM", "switch the lights off ROOM", "lights off ROOM"),
    ("activate", "lamp"): ("turn on the lamp", "switch on the lamp", "lamp on"),
    ("deactivate", "lamp"): ("turn off the lamp", "switch off the lamp", "lamp off"),
    ("activate", "music"): ("play the music", "put on the music", "start the music"),
    ("deactivate", "music"): ("pause the music", "stop the music", "turn off the music"),
    ("increase", "heat"): ("turn up the heat ROOM", "make it warmer ROOM", "increase the temperature ROOM"),
    ("decrease", "heat"): ("turn down the heat ROOM", "make it cooler ROOM", "decrease the temperature ROOM"),
    ("increase", "volume"): ("turn up the volume", "make it louder", "louder please"),
    ("decrease", "volume"): ("turn down the volume", "make it softer", "that is too loud"),
    ("bring", "newspaper"): ("bring me the newspaper", "fetch the newspaper", "go get the newspaper"),
    ("bring", "juice"): ("bring me some juice", "fetch the juice", "get me some juice"),
    ("bring", "socks"): ("bring me my socks", "fetch my socks", "get me a pair of socks"),
    ("bring", "shoes"): ("bring me my shoes", "fetch my shoes", "get me my shoes"),
    ("change language", "none"): ("change the language", "switch languages", "open language settings"),
    ("change language", "Chinese"): ("switch the language to Chinese", "use Chinese", "practice Chinese"),
    ("change language", "Korean"): ("switch the language to Korean", "use Korean", "practice Korean"),
    ("change language", "English"): ("switch the language to English", "use English", "practice English"),
    ("change language", "German"): ("switch the language to German", "use German", "practice German"),
}


@dataclass(frozen=True)
class Command:
    """One command: its intent (action, object, location) and its words."""

    action: str
    object: str
    location: str
    text: str


@dataclass(frozen=True, kw_only=True)
class CommandSpeaker(RecordingJob):
    """One speaker: some commands, each in a room of its own."""

    split: str
    speaker_id: str
    voice: Voice
    commands: tuple[Command, ...]

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        recorded = Recorded()
        for command in self.commands:
            speech = synthesiser.synthesise(command.text, self.voice.varied(generator))
            # The name is drawn before the room: the order of the draws fixes the bytes.
            path = FOLDER / "wavs" / "speakers" / self.speaker_id / f"{uuid.UUID(bytes=generator.bytes(16))}.wav"
            recorded.write(self.root, path, apply_random_room(speech.samples, SNR_DB, generator))
        return recorded


def intents() -> list[tuple[Command, ...]]:
    """Return the 31 intents, each as the tuple of its phrasings."""
    found = []
    for (action, thing), phrasings in PHRASINGS.items():
        for room in ("none", *ROOMS) if " ROOM" in phrasings[0] else ("none",):
            location = "" if room == "none" else f" in the {room}"
            texts = [phrasing.replace(" ROOM", location).capitalize() for phrasing in phrasings]
            found.append(tuple(Command(action, thing, room, text) for text in texts))
    return found


def plan_command_speakers(
    root: Path, num_speakers: int, commands_a_speaker: int, num_more: int, scale: float, seed: int
) -> list[CommandSpeaker]:
    """Return the jobs. Intents are equally frequent over all speakers of a split.

    num_more: further speakers of test, who leave all others as they are.
    """
    generator = np.random.default_rng(seed)
    count, num_more = scaled(num_speakers, scale, least=4), scaled(num_more, scale, least=0)
    num_test, num_dev = max(1, round(SHARE_OF_TEST * count)), max(1, round(SHARE_OF_DEV * count))
    splits = ["train"] * (count - num_dev - num_test) + ["valid"] * num_dev + ["test"] * num_test
    voices = draw_voices(SCORED_VARIANTS, count, generator) + more_voices(SCORED_VARIANTS, count, num_more, seed)
    splits += ["test"] * num_more
    # Intents of a split that no speaker has yet: all 31 in random order, again when fewer than needed are left.
    waiting: dict[str, list[tuple[Command, ...]]] = {split: [] for split in splits}
    jobs = []
    for split, voice, job_seed in zip(splits, voices, spawn_seeds(seed, count + num_more), strict=True):
        while len(waiting[split]) < commands_a_speaker:
            every = intents()
            waiting[split] += [every[index] for index in generator.permutation(len(every))]
        chosen, waiting[split] = waiting[split][:commands_a_speaker], waiting[split][commands_a_speaker:]
        commands = tuple(phrasings[int(generator.integers(len(phrasings)))] for phrasings in chosen)
        speaker_id = "".join(generator.choice(SPEAKER_LETTERS, 16))
        jobs.append(
            CommandSpeaker(root=root, seed=job_seed, split=split, speaker_id=speaker_id, voice=voice, commands=commands)
        )
    return jobs


def write_tables(jobs: Sequence[CommandSpeaker], recorded: Sequence[Recorded]) -> None:
    """Write {train,valid,test}_data.csv, with the published columns."""
    folder = jobs[0].root / FOLDER / "data"
    folder.mkdir()
    for split in dict.fromkeys(job.split for job in jobs):
        rows = [
            (Path(path).relative_to(FOLDER), job.speaker_id, asked.text, asked.action, asked.object, asked.location)
            for job, one in zip(jobs, recorded, strict=True)
            if job.split == split
            for path, asked in zip(one.seconds, job.commands, strict=True)
        ]
        with (folder / f"{split}_data.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([COLUMNS, *((number, *row) for number, row in enumerate(rows))])
