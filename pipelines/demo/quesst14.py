"""Spoken queries and longer spoken documents in the layout of QUESST 2014 (Anguera et al., MediaEval 2014), 8 kHz.

    quesst14Database/Audio/quesst2014_NNNNN.wav, {dev,eval}_queries/quesst2014_{dev,eval}_NNNN.wav
    quesst14Database/scoring/language_key_{utterances,dev,eval}.lst
    quesst14Database/scoring/groundtruth_quesst14_{dev,eval}/ with NIST's rttm, tlist.xml and ecf.xml

A query is one word or two that stand side by side in some document, said by themselves by a voice that speaks in no
document: only what is said is alike. All of it is English; the published data set has six languages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from pipelines.demo.espeak import SAMPLE_RATE_HZ, Speaker
from pipelines.demo.recording import Recorded, scaled, spawn_seeds, write_audio
from pipelines.demo.room_acoustics import draw_place, heard_in
from pipelines.demo.sentences import ADJECTIVES, NOUNS, sentences
from pipelines.demo.voices import SCORED_VARIANTS, Voice, draw_voices

RATE_HZ = 8_000
SNR_DB = (10.0, 30.0)
BASE = Path("quesst14Database")
LANGUAGE = "nnenglish"
DOCUMENT_VOICES, QUERY_VOICES = 12, 8
SENTENCES_A_DOCUMENT = 2
LETTERS = 6  # the fewest of a query: a short word is found everywhere
MOST_HOLDING = 8  # documents that hold a query
AUDIO, DEV, EVAL = "Audio", "dev_queries", "eval_queries"


@dataclass(frozen=True)
class Saying:
    """The job of one document or query: `text` by `voice`, in a place of its own."""

    root: Path
    folder: str
    name: str
    text: str
    voice: Voice
    seed: int

    @property
    def planned_s(self) -> float:
        return 0.35 * len(self.text.split())

    @property
    def path(self) -> Path:
        return Path(self.folder, f"{self.name}.wav")

    def record(self, speaker: Speaker) -> Recorded:
        generator = np.random.default_rng(self.seed)
        speech = speaker.speak(self.text, self.voice.moved(generator))
        heard = heard_in(speech.samples, draw_place(generator, SNR_DB), generator)
        samples = np.clip(resample_poly(heard, RATE_HZ, SAMPLE_RATE_HZ), -1, 1)
        return Recorded({str(BASE / self.path): write_audio(self.root / BASE / self.path, samples, RATE_HZ)})


def plan_search(root: Path, num_documents: int, num_queries: int, scale: float, seed: int) -> list[Saying]:
    """The jobs: documents, then as many queries for dev as for eval, of different words."""
    generator = np.random.default_rng(seed)
    told = sentences("speaker", generator)
    num_documents, num_queries = scaled(num_documents, scale, least=12), scaled(num_queries, scale, least=3)
    texts = [". ".join(next(told) for _ in range(SENTENCES_A_DOCUMENT)) for _ in range(num_documents)]
    queries = _draw_queries(texts, 2 * num_queries, generator)
    num_queries = len(queries) // 2
    voices = draw_voices(SCORED_VARIANTS, DOCUMENT_VOICES + QUERY_VOICES, generator)
    seeds = iter(spawn_seeds(seed, num_documents + 2 * num_queries))
    said = [(AUDIO, f"quesst2014_{number:05d}", text) for number, text in enumerate(texts, start=1)]
    said += [(DEV, f"quesst2014_dev_{number:04d}", text) for number, text in enumerate(queries[:num_queries], start=1)]
    said += [
        (EVAL, f"quesst2014_eval_{number:04d}", text) for number, text in enumerate(queries[num_queries:], start=1)
    ]
    voices_of = {AUDIO: voices[:DOCUMENT_VOICES], DEV: voices[DOCUMENT_VOICES:], EVAL: voices[DOCUMENT_VOICES:]}
    return [
        Saying(root, folder, name, text, voices_of[folder][generator.integers(len(voices_of[folder]))], next(seeds))
        for folder, name, text in said
    ]


def holds(text: str, query: str) -> bool:
    """Whether the document says the query's words side by side, in one sentence."""
    return any(f" {query} " in f" {sentence} " for sentence in text.split(". "))


def write_scoring(jobs: Sequence[Saying], recorded: Sequence[Recorded]) -> None:
    """The folder `scoring`: whose language is what, and which document holds which query."""
    root = jobs[0].root / BASE / "scoring"
    root.mkdir(parents=True, exist_ok=True)
    by_folder = {folder: [job for job in jobs if job.folder == folder] for folder in (AUDIO, DEV, EVAL)}
    for folder, key in ((AUDIO, "utterances"), (DEV, "dev"), (EVAL, "eval")):
        lines = [f"{BASE / job.path} {LANGUAGE}\n" for job in by_folder[folder]]
        (root / f"language_key_{key}.lst").write_text("".join(lines))
    seconds = {path: s for take in recorded for path, s in take.seconds.items()}
    length_of = {job.name: seconds[str(BASE / job.path)] for job in by_folder[AUDIO]}
    for folder, key in ((DEV, "dev"), (EVAL, "eval")):
        _write_ground_truth(root / f"groundtruth_quesst14_{key}", key, by_folder[folder], by_folder[AUDIO], length_of)


def _write_ground_truth(
    folder: Path, key: str, queries: list[Saying], documents: list[Saying], length_of: dict[str, float]
) -> None:
    folder.mkdir(exist_ok=True)
    rttm = [
        f"LEXEME {document.name} 1 0.000 {length_of[document.name]:.3f} {query.name} lex unknown <NA>\n"
        for document in documents
        for query in queries
        if holds(document.text, query.text)
    ]
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


def _draw_queries(texts: list[str], count: int, generator: np.random.Generator) -> list[str]:
    """Up to `count` queries that a few of the documents hold: a noun, or an adjective and a noun; none in another."""
    words = {word for text in texts for word in text.replace(". ", " ").split()}
    nouns = sorted(word for word in words & set(NOUNS) if len(word) >= LETTERS)
    pairs = sorted(
        {f"{a} {b}" for text in texts for a, b in itertools.pairwise(text.split()) if a in ADJECTIVES and b in NOUNS}
    )
    drawn: list[str] = []
    for query in generator.permutation(nouns + pairs):
        taken = {word for other in drawn for word in other.split()}
        num_holding = sum(holds(text, str(query)) for text in texts)
        if not taken & set(str(query).split()) and num_holding <= MOST_HOLDING:
            drawn.append(str(query))
    return drawn[: min(count, len(drawn) // 2 * 2)]
