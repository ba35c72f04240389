"""Requests to an assistant in the layout of Audio SNIPS as SUPERB prepares it (Lai et al., arXiv 2010.13105).

    SNIPS/{train,valid,test}/SPEAKER-snips-SPLIT-N.wav     SNIPS/all.iob.snips.txt     SNIPS/slots.txt

N numbers the sentences of a split. The speakers have the published names, those that SUPERB uses of each split: no
speaker and no sentence is in two splits. The vocabulary is closed (about a hundred words), so that a CTC head can learn
to spell it.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import apply_random_room
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

SNR_DB = (10.0, 25.0)
SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
SPLIT_OF_EIGHTH = ("train",) * 6 + ("valid", "test")  # of the sentences of each template
SHARE_OF_HELD_OUT = 0.5  # requests of a speaker of valid or test, relative to a training speaker
# Published intents, slots and their names; {SLOT} is replaced by one of its values.
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
Sentence = tuple[tuple[str, ...], tuple[str, ...]]  # words in lower case, and the slot of each (or O)


@dataclass(frozen=True)
class Request:
    """One sentence of a split: its number, its words in lower case, the slot of each (or O), and its intent."""

    number: int
    words: tuple[str, ...]
    slots: tuple[str, ...]
    intent: str


@dataclass(frozen=True, kw_only=True)
class RequestSpeaker(RecordingJob):
    """One speaker: some requests, each in a room of its own."""

    split: str
    name: str
    voice: Voice
    requests: tuple[Request, ...]

    def utterance_id(self, request: Request) -> str:
        """Return the published form of an id."""
        return f"{self.name}-snips-{self.split}-{request.number}"

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        recorded = Recorded()
        for request in self.requests:
            speech = synthesiser.synthesise(" ".join(request.words), self.voice.varied(generator))
            path = Path("SNIPS", self.split, f"{self.utterance_id(request)}.wav")
            recorded.write(self.root, path, apply_random_room(speech.samples, SNR_DB, generator))
        return recorded


def expand(template: str) -> list[Sentence]:
    """Return every sentence of a template."""
    # Alternating literal text (even indices) and names of slots (odd indices).
    parts = re.split(r"{(\w+)}", template)
    choices = [SLOTS[part] if index % 2 else (part,) for index, part in enumerate(parts)]
    kinds = [part if index % 2 else "O" for index, part in enumerate(parts)]
    found = []
    for values in itertools.product(*choices):
        tagged = [(word, kind) for value, kind in zip(values, kinds, strict=True) for word in value.split()]
        words, slots = zip(*tagged, strict=True)
        found.append((words, slots))
    return found


def draw_requests(split: str, seed: int) -> Iterator[Request]:
    """Yield requests of a split without end, numbered; with one seed no sentence is in two splits.

    Intents are equally frequent.
    """
    generator = np.random.default_rng(seed)
    own: dict[str, list[list[Sentence]]] = {intent: [] for intent in REQUESTS}  # by template
    for intent, templates in REQUESTS.items():
        for template in templates:
            every = expand(template)
            order = generator.permutation(len(every))  # the same for all splits
            chosen = [every[i] for at, i in enumerate(order) if SPLIT_OF_EIGHTH[at % len(SPLIT_OF_EIGHTH)] == split]
            if chosen:
                own[intent].append(chosen)
    for number in itertools.count():
        intent = list(REQUESTS)[number % len(REQUESTS)]
        some = own[intent][int(generator.integers(len(own[intent])))]
        yield Request(number, *some[int(generator.integers(len(some)))], intent)


def plan_requests(
    root: Path, requests_a_speaker: int, requests_a_test_speaker: int, scale: float, seed: int
) -> list[RequestSpeaker]:
    """Return the jobs: the published speakers at every scale, which changes the number of their requests.

    requests_a_test_speaker: 0 for as many as a speaker of valid has.
    """
    num_speakers = sum(map(len, SPEAKERS.values()))
    voices = iter(draw_voices(SCORED_VARIANTS, num_speakers, np.random.default_rng(seed)))
    seeds = iter(spawn_seeds(seed, num_speakers))
    jobs = []
    for split, names in SPEAKERS.items():
        wanted = round(requests_a_speaker * (1.0 if split == "train" else SHARE_OF_HELD_OUT))
        if split == "test" and requests_a_test_speaker:
            wanted = requests_a_test_speaker
        count = scaled(wanted, scale, least=2)
        drawn = draw_requests(split, seed)
        for name in names:
            some = tuple(itertools.islice(drawn, count))
            jobs.append(
                RequestSpeaker(root=root, seed=next(seeds), split=split, name=name, voice=next(voices), requests=some)
            )
    return jobs


def write_annotations(jobs: Sequence[RequestSpeaker], recorded: Sequence[Recorded]) -> None:
    """Write all.iob.snips.txt, one line per utterance, and slots.txt, the most frequent slot first."""
    lines = []
    counts: Counter[str] = Counter()
    for job in jobs:
        for request in job.requests:
            words, slots = " ".join(request.words).upper(), " ".join(request.slots)
            lines.append(f"{job.utterance_id(request)} BOS {words} EOS\tO {slots} {request.intent}\n")
            counts.update(request.slots)
    folder = jobs[0].root / "SNIPS"
    (folder / "all.iob.snips.txt").write_text("".join(lines))
    (folder / "slots.txt").write_text("\n".join(slot for slot, _ in counts.most_common()))
