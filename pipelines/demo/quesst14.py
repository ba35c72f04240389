"""Spoken queries and spoken documents in the layout of QUESST 2014 (Anguera et al., MediaEval 2014), 8 kHz.

    quesst14Database/Audio/quesst2014_NNNNN.wav, {dev,eval}_queries/quesst2014_{dev,eval}_NNNN.wav
    quesst14Database/scoring/language_key_{utterances,dev,eval}.lst
    quesst14Database/scoring/groundtruth_quesst14_{dev,eval}/ with NIST's rttm, tlist.xml and ecf.xml

A query is one word or two adjacent words of some document, in isolation, by a voice of no document: query and document
have only their words in common. All of it is English; the published data set has six languages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from pipelines.demo.espeak import Synthesiser
from pipelines.demo.recording import Recorded, RecordingJob, scaled, spawn_seeds
from pipelines.demo.room_acoustics import SAMPLE_RATE_HZ, apply_random_room
from pipelines.demo.sentences import ADJECTIVES, NOUNS, sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

RATE_HZ = 8_000  # telephone bandwidth, as published
SNR_DB = (10.0, 30.0)
BASE = Path("quesst14Database")
LANGUAGE = "nnenglish"  # the published name of non-native English
DOCUMENT_VOICES, QUERY_VOICES = 12, 8
SENTENCES_A_DOCUMENT = 2
FEWEST_LETTERS = 6  # of a one-word query: short words match everywhere
MOST_DOCUMENTS = 8  # that match one query
AUDIO, DEV, EVAL = "Audio", "dev_queries", "eval_queries"


@dataclass(frozen=True, kw_only=True)
class SpokenText(RecordingJob):
    """One document or query: `text` in `voice`, in a room of its own."""

    folder: str
    name: str
    text: str
    voice: Voice

    @property
    def path(self) -> Path:
        """Path of the file below the root."""
        return BASE / self.folder / f"{self.name}.wav"

    def record(self, synthesiser: Synthesiser) -> Recorded:
        generator = np.random.default_rng(self.seed)
        speech = synthesiser.synthesise(self.text, self.voice.varied(generator))
        samples = apply_random_room(speech.samples, SNR_DB, generator)
        recorded = Recorded()
        # The resampling filter may overshoot full scale.
        samples = np.clip(resample_poly(samples, RATE_HZ, SAMPLE_RATE_HZ), -1, 1)
        recorded.write(self.root, self.path, samples, RATE_HZ)
        return recorded


def plan_search(
    root: Path, num_documents: int, num_queries: int, num_more: int, scale: float, seed: int
) -> list[SpokenText]:
    """Return the jobs: documents, then as many queries for dev as for eval, of different words.

    num_more: further queries for eval, which leave all others as they are: of words that are left, then the words of
    eval again by voices drawn anew.
    """
    generator = np.random.default_rng(seed)
    num_documents, num_queries = scaled(num_documents, scale, least=12), scaled(num_queries, scale, least=3)
    num_more = scaled(num_more, scale, least=0)
    drawn = sentences("speaker", generator)
    documents = [". ".join(itertools.islice(drawn, SENTENCES_A_DOCUMENT)) for _ in range(num_documents)]
    queries = _draw_queries(documents, generator)
    half = min(num_queries, len(queries) // 2)
    more = itertools.islice(itertools.chain(queries[2 * half :], itertools.cycle(queries[half : 2 * half])), num_more)
    of_eval = [*queries[half : 2 * half], *more]
    voices = draw_voices(SCORED_VARIANTS, DOCUMENT_VOICES + QUERY_VOICES, generator)
    seeds = iter(spawn_seeds(seed, num_documents + half + len(of_eval)))
    texts = [(AUDIO, f"quesst2014_{number:05d}", text) for number, text in enumerate(documents, start=1)]
    for folder, key, some in ((DEV, "dev", queries[:half]), (EVAL, "eval", of_eval)):
        texts += [(folder, f"quesst2014_{key}_{number:04d}", text) for number, text in enumerate(some, start=1)]
    voices_of = {AUDIO: voices[:DOCUMENT_VOICES], DEV: voices[DOCUMENT_VOICES:], EVAL: voices[DOCUMENT_VOICES:]}
    return [
        SpokenText(
            root=root,
            seed=next(seeds),
            folder=folder,
            name=name,
            text=text,
            voice=voices_of[folder][generator.integers(len(voices_of[folder]))],
        )
        for folder, name, text in texts
    ]


def matches(document: str, query: str) -> bool:
    """Return whether the words of the query are adjacent in one sentence of the document."""
    return any(f" {query} " in f" {sentence} " for sentence in document.split(". "))


def write_scoring(jobs: Sequence[SpokenText], recorded: Sequence[Recorded]) -> None:
    """Write the folder `scoring`: the language of every file, and the documents that match each query."""
    root = jobs[0].root / BASE / "scoring"
    root.mkdir(parents=True, exist_ok=True)
    by_folder = {folder: [job for job in jobs if job.folder == folder] for folder in (AUDIO, DEV, EVAL)}
    for folder, key in ((AUDIO, "utterances"), (DEV, "dev"), (EVAL, "eval")):
        lines = [f"{job.path} {LANGUAGE}\n" for job in by_folder[folder]]
        (root / f"language_key_{key}.lst").write_text("".join(lines))
    seconds = {path: s for one in recorded for path, s in one.seconds.items()}
    length_of = {job.name: seconds[str(job.path)] for job in by_folder[AUDIO]}
    for folder, key in ((DEV, "dev"), (EVAL, "eval")):
        _write_ground_truth(root / f"groundtruth_quesst14_{key}", key, by_folder[folder], by_folder[AUDIO], length_of)


def _write_ground_truth(
    folder: Path, key: str, queries: list[SpokenText], documents: list[SpokenText], length_of: dict[str, float]
) -> None:
    """Write the matches (rttm), the terms (tlist.xml) and the documents (ecf.xml) in NIST's formats."""
    folder.mkdir(exist_ok=True)
    rttm = [
        f"LEXEME {document.name} 1 0.000 {length_of[document.name]:.3f} {query.name} lex unknown <NA>\n"
        for document in documents
        for query in queries
        if matches(document.text, query.text)
    ]
    # As in the published set, the text of a term is its name.
    terms = [f'  <term termid="{query.name}"><termtext>{query.name}</termtext></term>\n' for query in queries]
    excerpts = [
        f'  <excerpt audio_filename="{name}.wav" channel="1" tbeg="0.000" dur="{s:.3f}" source_type="splitcts"/>\n'
        for name, s in length_of.items()
    ]
    ecf = f"quesst2014_{key}.ecf.xml"
    (folder / f"quesst2014_{key}.rttm").write_text("".join(rttm))
    (folder / f"quesst2014_{key}.tlist.xml").write_text(
        f'<termlist ecf_filename="{ecf}" version="1" language="english">\n{"".join(terms)}</termlist>\n'
    )
    (folder / ecf).write_text(
        f'<ecf source_signal_duration="{sum(length_of.values()):.3f}" version="1">\n{"".join(excerpts)}</ecf>\n'
    )


def _draw_queries(documents: list[str], generator: np.random.Generator) -> list[str]:
    """Draw as many queries as the documents allow: a noun, or an adjective and a noun, no word in two queries.

    Each matches at least one and at most MOST_DOCUMENTS documents.
    """
    words = {word for text in documents for word in text.replace(". ", " ").split()}
    nouns = sorted(word for word in words & set(NOUNS) if len(word) >= FEWEST_LETTERS)
    adjacent = {pair for text in documents for pair in itertools.pairwise(text.split())}
    pairs = sorted(f"{first} {second}" for first, second in adjacent if first in ADJECTIVES and second in NOUNS)
    drawn: list[str] = []
    for query in map(str, generator.permutation(nouns + pairs)):
        taken = {word for other in drawn for word in other.split()}
        num_matches = sum(matches(text, query) for text in documents)
        if not taken & set(query.split()) and num_matches <= MOST_DOCUMENTS:
            drawn.append(query)
    return drawn
