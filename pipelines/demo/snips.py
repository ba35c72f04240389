"""Requests to an assistant in the layout of Audio SNIPS as SUPERB prepares it (Lai et al., arXiv 2010.13105).

    SNIPS/{train,valid,test}/SPEAKER-snips-SPLIT-N.wav     SNIPS/all.iob.snips.txt     SNIPS/slots.txt

N numbers the sentences of a split. The published speakers by name, those that SUPERB uses of each split: no speaker is
in two splits, and no sentence. A closed vocabulary of some hundred words, which a CTC head can learn to spell.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import draw_place, heard_in
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (10.0, 25.0)
REQUEST_S = 2.2  # roughly
SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
EIGHTH_OF = ("train",) * 6 + ("valid", "test")  # of the sentences of each template
SHARE_OF_HELD_OUT = 0.5  # of what a training speaker says, said by a speaker of valid or test
# Intents, slots and their names are published ones; {SLOT} stands for one of its values.
REQUESTS = {
    "PlayMusic": ("play {track}", "play {track} by {artist}", "play {artist} on {service}"),
    "AddToPlaylist": ("add {track} to my {playlist} playlist", "put {artist} on the {playlist} playlist"),
    "GetWeather": ("weather in {city} {timeRange}", "will it {condition_description} in {city}"),
    "BookRestaurant": ("book a table for {party_size_number} in {city}", "book a {restaurant_type} {timeRange}"),
    "RateBook": ("rate {object_name} {rating_value} stars", "give {rating_value} points to {object_name}"),
    "SearchCreativeWork": ("find the {object_type} {object_name}", "show me {object_name}"),
    "SearchScreeningEvent": ("is {movie_name} playing {timeRange}", "when is {movie_name} playing"),
}
SLOTS = {
    "track": ("blue skies", "golden river", "winter sun", "midnight train"),
    "artist": ("bruno", "madonna", "the beatles", "nina simone"),
    "service": ("youtube", "spotify"),
    "playlist": ("party", "workout", "summer", "classical"),
    "city": ("boston", "paris", "tokyo", "new york"),
    "timeRange": ("today", "tomorrow", "on monday", "next week"),
    "condition_description": ("rain", "snow"),
    "party_size_number": ("two", "four", "seven"),
    "restaurant_type": ("bakery", "steakhouse"),
    "rating_value": ("one", "three", "five"),
    "object_name": ("the hobbit", "moby dick", "dracula", "animal farm"),
    "object_type": ("book", "novel", "song"),
    "movie_name": ("the matrix", "star wars", "titanic", "king kong"),
}


@dataclass(frozen=True)
class Request:
    """One sentence of a split, by its number: words in lower case, the slot of each (or O), and the intent."""

    number: int
    words: tuple[str, ...]
    slots: tuple[str, ...]
    intent: str


@dataclass(frozen=True)
class Asking:
    """The job of one speaker: some requests, each in a place of its own."""

    root: Path
    split: str
    name: str
    voice: Voice
    requests: tuple[Request, ...]
    seed: int

    @property
    def planned_s(self) -> float:
        return REQUEST_S * len(self.requests)

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        seconds: dict[str, float] = {}
        for request in self.requests:
            speech = speaker.speak(" ".join(request.words), self.voice.moved(generator))
            path = Path("SNIPS", self.split, f"{self.utterance(request)}.wav")
            heard = heard_in(speech.samples, draw_place(generator, SNR_DB), generator)
            seconds[str(path)] = write_audio(self.root / path, heard)
        return Recorded(seconds)

    def utterance(self, request: Request) -> str:
        return f"{self.name}-snips-{self.split}-{request.number}"


def sentences(template: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every sentence of a template: its words, and the slot of each."""
    parts = [re.fullmatch(r"{(\w+)}", part) or part for part in template.split()]
    choices = [SLOTS[part[1]] if isinstance(part, re.Match) else (part,) for part in parts]
    kinds = [part[1] if isinstance(part, re.Match) else "O" for part in parts]
    found = []
    for values in itertools.product(*choices):
        said = [(word, kind) for value, kind in zip(values, kinds, strict=True) for word in value.split()]
        words, slots = zip(*said, strict=True)
        found.append((words, slots))
    return found


def requests(split: str, seed: int) -> Iterator[Request]:
    """Endless sentences of a split, numbered; none is of another split with this seed. Intents come equally often."""
    generator = np.random.default_rng(seed)
    own: dict[str, list[list[tuple[tuple[str, ...], tuple[str, ...]]]]] = {}
    for intent, templates in REQUESTS.items():
        for template in templates:
            every = sentences(template)
            order = generator.permutation(len(every))
            mine = [every[i] for place, i in enumerate(order) if EIGHTH_OF[place % len(EIGHTH_OF)] == split]
            if mine:
                own.setdefault(intent, []).append(mine)
    for number in itertools.count():
        intent = list(REQUESTS)[number % len(REQUESTS)]
        some = own[intent][int(generator.integers(len(own[intent])))]
        yield Request(number, *some[int(generator.integers(len(some)))], intent)


def plan_requests(root: Path, requests_a_speaker: int, scale: float, seed: int) -> list[Asking]:
    """The jobs: the published speakers, whatever the scale; it changes how much each says."""
    generator = np.random.default_rng(seed)
    voices = iter(draw_voices(SCORED_VARIANTS, sum(map(len, SPEAKERS.values())), generator))
    seeds = iter(spawn_seeds(seed, sum(map(len, SPEAKERS.values()))))
    jobs = []
    for split, names in SPEAKERS.items():
        share = 1.0 if split == "train" else SHARE_OF_HELD_OUT
        count = scaled(round(requests_a_speaker * share), scale, least=2)
        numbered = requests(split, seed)
        jobs += [
            Asking(root, split, name, next(voices), tuple(next(numbered) for _ in range(count)), next(seeds))
            for name in names
        ]
    return jobs


def write_annotations(jobs: Sequence[Asking], recorded: Sequence[Recorded]) -> None:
    """all.iob.snips.txt, a line an utterance, and slots.txt, the most frequent first."""
    lines = []
    counts: Counter[str] = Counter()
    for job in jobs:
        for said in job.requests:
            words, slots = " ".join(said.words).upper(), " ".join(said.slots)
            lines.append(f"{job.utterance(said)} BOS {words} EOS\tO {slots} {said.intent}\n")
            counts.update(said.slots)
    folder = jobs[0].root / "SNIPS"
    (folder / "all.iob.snips.txt").write_text("".join(lines))
    (folder / "slots.txt").write_text("\n".join(slot for slot, _ in counts.most_common()))
