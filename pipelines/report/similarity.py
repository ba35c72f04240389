"""How alike the layers of each student and of the teacher are, from the stores that scoring left: no model is run.

Linear CKA (`extract.stats`) of every student layer with every teacher layer, over the same frames of the same
utterances. A few utterances spread over the split, and a few frames spread over each, bound time and memory whatever
the size of the stores. Shapes: L the teacher's layers, S the student's, N frames, D and E features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.reader import StoreReader
from pipelines.report.results import TEACHER

NUM_UTTERANCES, FRAMES_EACH = 32, 128


@dataclass(frozen=True)
class LayerSimilarity:
    """One student beside its teacher. `cka_SL`: float32, nan where a layer never varies."""

    layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    cka_SL: NDArray[np.float32]


@dataclass(frozen=True)
class Similarities:
    """By student; `notes` name the students left out, and why. `heard` says what it was measured on."""

    by_student: dict[str, LayerSimilarity]
    notes: tuple[str, ...]
    heard: str


def measure_similarity(manifests: Path, students: Sequence[str], corpus: Corpus, split: str) -> Similarities:
    """Compare the stores of `manifests`/NAME.json. What can't be compared is left out, with a note."""
    try:
        teacher = _open(manifests, TEACHER, corpus)
        indices = choose_utterances(teacher, corpus, split)
        teacher_LND = unit_energy(read_frames(teacher, indices))
    except RetortError as error:
        return Similarities({}, (f"No student is compared with its teacher: {error}",), "")
    by_student, notes = {}, []
    for name in students:
        try:
            student = _open(manifests, name, corpus)
            _check_same_frames(student, teacher, indices)
            student_SNE = unit_energy(read_frames(student, indices))
        except RetortError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        cka_SL = linear_cka(student_SNE, teacher_LND)
        by_student[name] = LayerSimilarity(student.layers, teacher.layers, cka_SL)
    heard = f"{teacher_LND.shape[1]:,} frames of {len(indices)} utterances of {corpus.name}, split {split}"
    return Similarities(by_student, tuple(notes), heard)


def _open(manifests: Path, name: str, corpus: Corpus) -> StoreReader:
    path = manifests / f"{name}.json"
    if not path.is_file():
        raise RetortError(f"{path} is missing; `dvc repro {path}` makes it")
    return StoreReader.open(path, corpus)


def choose_utterances(reader: StoreReader, corpus: Corpus, split: str) -> NDArray[np.int64]:
    """Corpus indices of at most NUM_UTTERANCES utterances that the store has, spread over the split."""
    kept = corpus.select(split)
    kept = kept[reader.pack_of[kept] >= 0]
    return kept[_spread(len(kept), NUM_UTTERANCES)]


def read_frames(reader: StoreReader, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """At most FRAMES_EACH frames of each utterance, spread over it, end to end: float32 (L, N, D)."""
    parts = []
    for index in indices:
        hidden_LTD = reader.hidden_at(int(index))
        parts.append(hidden_LTD[:, _spread(hidden_LTD.shape[1], FRAMES_EACH)])
    return np.concatenate(parts, axis=1)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` places, at even distances."""
    wanted = min(count, most)
    return np.arange(wanted, dtype=np.int64) * count // max(1, wanted)


def _check_same_frames(student: StoreReader, teacher: StoreReader, indices: NDArray[np.int64]) -> None:
    if student.hop_samples != teacher.hop_samples:
        raise RetortError(f"its frames are {student.hop_samples} samples apart, its teacher's {teacher.hop_samples}")
    if not np.array_equal(student.num_frames[indices], teacher.num_frames[indices]):
        raise RetortError("its utterances have other numbers of frames than its teacher's")


def unit_energy(hidden_LND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each layer centred over its frames and scaled to ||X'X||_F = 1, which is all that linear CKA asks of one side."""
    mean_L1D = hidden_LND.mean(axis=1, keepdims=True, dtype=np.float64)
    centred_LND: NDArray[np.float32] = hidden_LND - np.asarray(mean_L1D, dtype=np.float32)
    for layer_ND in centred_LND:
        with np.errstate(invalid="ignore", divide="ignore"):
            layer_ND /= np.sqrt(np.linalg.norm(layer_ND.T @ layer_ND))
    return centred_LND


def linear_cka(one_SNE: NDArray[np.float32], other_LND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Linear CKA of all pairs of layers of unit energy, (S, L): ||Y'X||_F^2, Kornblith et al. 2019 (1905.00414)."""
    return np.array(
        [[np.square(one_NE.T @ other_ND).sum() for other_ND in other_LND] for one_NE in one_SNE], dtype=np.float32
    )
