"""Spoken commands in the layout of Fluent Speech Commands (Lugosch, arXiv 1904.03670).

    fluent_speech_commands_dataset/wavs/speakers/SPEAKER/<uuid>.wav
    fluent_speech_commands_dataset/data/{train,valid,test}_data.csv

The published 31 intents, each in a few phrasings. As there, no speaker is in two splits, and the phrasings are the same
in all of them.
"""

from __future__ import annotations

import csv
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import draw_place, heard_in
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

FOLDER = Path("fluent_speech_commands_dataset")
SNR_DB = (8.0, 25.0)
COMMAND_S = 1.6  # roughly
SHARE_OF_DEV, SHARE_OF_TEST = 0.15, 0.2  # published: 10 and 10 of 97 speakers
SPEAKER_LETTERS = list(string.ascii_letters + string.digits)
COLUMNS = ("", "path", "speakerId", "transcription", "action", "object", "location")
ROOMS = ("kitchen", "bedroom", "washroom")
# action, object -> phrasings; those with WHERE are said with and without a room
PHRASINGS = {
    ("activate", "lights"): ("turn on the lights WHERE", "switch the lights on WHERE", "lights on WHERE"),
    ("deactivate", "lights"): ("turn off the lights WHERE", "switch the lights off WHERE", "lights off WHERE"),
    ("activate", "lamp"): ("turn on the lamp", "switch on the lamp", "lamp on"),
    ("deactivate", "lamp"): ("turn off the lamp", "switch off the lamp", "lamp off"),
    ("activate", "music"): ("play the music", "put on the music", "start the music"),
    ("deactivate", "music"): ("pause the music", "stop the music", "turn off the music"),
    ("increase", "heat"): ("turn up the heat WHERE", "make it warmer WHERE", "increase the temperature WHERE"),
    ("decrease", "heat"): ("turn down the heat WHERE", "make it cooler WHERE", "decrease the temperature WHERE"),
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
    """What is asked for, and in which words."""

    action: str
    object: str
    location: str
    text: str


@dataclass(frozen=True)
class CommandSpeaker:
    """The job of one speaker: some commands, each in a place of its own."""

    root: Path
    split: str
    speaker_id: str
    voice: Voice
    commands: tuple[Command, ...]
    seed: int

    @property
    def planned_s(self) -> float:
        return COMMAND_S * len(self.commands)

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        seconds: dict[str, float] = {}
        for command in self.commands:
            speech = speaker.speak(command.text, self.voice.moved(generator))
            path = FOLDER / "wavs" / "speakers" / self.speaker_id / f"{uuid.UUID(bytes=generator.bytes(16))}.wav"
            heard = heard_in(speech.samples, draw_place(generator, SNR_DB), generator)
            seconds[str(path)] = write_audio(self.root / path, heard)
        return Recorded(seconds)


def intents() -> list[tuple[Command, ...]]:
    """The 31 intents, each as its phrasings."""
    found = []
    for (action, thing), phrasings in PHRASINGS.items():
        places = ("none", *ROOMS) if " WHERE" in phrasings[0] else ("none",)
        for place in places:
            where = "" if place == "none" else f" in the {place}"
            said = [phrasing.replace(" WHERE", where).capitalize() for phrasing in phrasings]
            found.append(tuple(Command(action, thing, place, text) for text in said))
    return found


def plan_command_speakers(
    root: Path, num_speakers: int, commands_a_speaker: int, scale: float, seed: int
) -> list[CommandSpeaker]:
    """The jobs. Intents come equally often, over all speakers of a split."""
    generator = np.random.default_rng(seed)
    count = scaled(num_speakers, scale, least=4)
    num_test, num_dev = max(1, round(SHARE_OF_TEST * count)), max(1, round(SHARE_OF_DEV * count))
    splits = ["train"] * (count - num_dev - num_test) + ["valid"] * num_dev + ["test"] * num_test
    voices = draw_voices(SCORED_VARIANTS, count, generator)
    waiting: dict[str, list[tuple[Command, ...]]] = {split: [] for split in splits}
    jobs = []
    for split, voice, job_seed in zip(splits, voices, spawn_seeds(seed, count), strict=True):
        while len(waiting[split]) < commands_a_speaker:
            every = intents()
            waiting[split] += [every[index] for index in generator.permutation(len(every))]
        asked, waiting[split] = waiting[split][:commands_a_speaker], waiting[split][commands_a_speaker:]
        commands = tuple(phrasings[int(generator.integers(len(phrasings)))] for phrasings in asked)
        jobs.append(
            CommandSpeaker(root, split, "".join(generator.choice(SPEAKER_LETTERS, 16)), voice, commands, job_seed)
        )
    return jobs


def write_tables(jobs: Sequence[CommandSpeaker], recorded: Sequence[Recorded]) -> None:
    """{train,valid,test}_data.csv, with the published columns."""
    folder = jobs[0].root / FOLDER / "data"
    folder.mkdir()
    for split in dict.fromkeys(job.split for job in jobs):
        rows = [
            (Path(path).relative_to(FOLDER), job.speaker_id, said.text, said.action, said.object, said.location)
            for job, take in zip(jobs, recorded, strict=True)
            if job.split == split
            for path, said in zip(take.seconds, job.commands, strict=True)
        ]
        with (folder / f"{split}_data.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([COLUMNS, *((number, *row) for number, row in enumerate(rows))])
