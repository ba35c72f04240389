"""Similarity of a student's layers to its teacher's, from the stores of both: no model runs.

`python -m extract compare TEACHER.json STUDENT.json --corpus corpora/NAME.json --out measures/compare/STUDENT.json`

Linear CKA of every student layer with every teacher layer, over the same frames of the same utterances. A fixed number
of utterances, spread over the split, and of frames, spread over each utterance, bounds time and memory for a store of
any size. Shapes: S student layers, L teacher layers, N frames, D and E features.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from extract.cka import linear_cka
from extract.corpus import Corpus
from extract.measures import CompareFile
from extract.store.reader import StoreReader

NUM_UTTERANCES, FRAMES_EACH = 32, 128  # 4,096 frames: 164 MB for 13 layers of 768 features


def compare_stores(teacher_path: Path, student_path: Path, corpus_path: Path, split: str) -> CompareFile:
    """Compare the stores of two manifests on a split. Stores that can't be compared give a record with `problem`.

    Raises RetortError for a manifest, corpus or split that can't be read.
    """
    corpus = Corpus.open(corpus_path)
    teacher, student = (StoreReader.open(path, corpus) for path in (teacher_path, student_path))
    indices = np.zeros(0, dtype=np.int64)
    problem: str | None = "its long utterances and the teacher's are cut differently"
    if student.manifest.cut_samples == teacher.manifest.cut_samples:
        indices = choose_utterances(teacher, student, teacher.rows_of(corpus).select(split))
        problem = find_problem(teacher, student, indices)
    cka_SL = np.empty((0, 0))
    if problem is None:
        cka_SL = cka_of_frames(read_frames(student, indices), read_frames(teacher, indices))
    num_frames = int(np.minimum(teacher.num_frames[indices], FRAMES_EACH).sum())  # N, as read_frames reads them
    return CompareFile(
        teacher=teacher.manifest.upstream["name"],
        student=student.manifest.upstream["name"],
        teacher_digest=teacher.digest,
        student_digest=student.digest,
        teacher_layers=teacher.layers,
        student_layers=student.layers,
        corpus=corpus.name,
        split=split,
        num_utterances=0 if problem else len(indices),
        num_frames=0 if problem else num_frames,
        linear_cka=tuple(tuple(None if np.isnan(cka) else cka for cka in row) for row in cka_SL.tolist()),
        problem=problem,
    )


def choose_utterances(teacher: StoreReader, student: StoreReader, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most NUM_UTTERANCES of the corpus indices, evenly spaced, of utterances that both stores hold."""
    kept = indices[(teacher.pack_of[indices] >= 0) & (student.pack_of[indices] >= 0)]  # -1: dropped
    return kept[_evenly_spaced(len(kept), NUM_UTTERANCES)]


def find_problem(teacher: StoreReader, student: StoreReader, indices: NDArray[np.int64]) -> str | None:
    """Return the reason why frames of the two stores do not correspond to each other, None if they do."""
    for reader in (teacher, student):
        if "frames" not in reader.keep:
            return f"{reader.source} keeps {', '.join(sorted(reader.keep))} and no frames"
    if student.hop_samples != teacher.hop_samples:
        return f"its frames are {student.hop_samples} samples apart, the teacher's {teacher.hop_samples}"
    # Equal hops are not enough: receptive fields of other sizes give other numbers of frames.
    if not np.array_equal(student.num_frames[indices], teacher.num_frames[indices]):
        return "its utterances and the teacher's differ in their numbers of frames"
    return None if len(indices) else "no utterance of the split is in both stores"


def read_frames(reader: StoreReader, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Read at most FRAMES_EACH evenly spaced frames of each utterance, end to end: float32 (L, N, D)."""
    parts = []
    for index in indices:
        hidden_LTD = reader.hidden_at(int(index))
        parts.append(hidden_LTD[:, _evenly_spaced(hidden_LTD.shape[1], FRAMES_EACH)])
    return np.concatenate(parts, axis=1)


def _evenly_spaced(count: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` of the positions 0 to count - 1, the first one included."""
    wanted = min(count, most)
    return np.arange(wanted, dtype=np.int64) * count // max(1, wanted)


def cka_of_frames(student_SNE: NDArray[np.float32], teacher_LND: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return linear CKA of all pairs of layers, float64 (S, L), from the same N frames of both."""
    student_SNE, teacher_LND = _centred(student_SNE), _centred(teacher_LND)
    cross_SL = np.array([[_energy(one_NE, other_ND) for other_ND in teacher_LND] for one_NE in student_SNE])
    # S x L products of (E, N) with (N, D); the own ones are needed once per layer
    own_S, own_L = (np.array([_energy(layer, layer) for layer in layers]) for layers in (student_SNE, teacher_LND))
    return linear_cka(cross_SL, own_S, own_L)


def _centred(hidden_LND: NDArray[np.float32]) -> NDArray[np.float32]:
    # The mean in float64: features of some layers are two orders of magnitude larger than their deviations.
    mean_L1D = hidden_LND.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred_LND: NDArray[np.float32] = hidden_LND - mean_L1D
    return centred_LND


def _energy(one_NE: NDArray[np.float32], other_ND: NDArray[np.float32]) -> float:
    """Return ||X'Y||_F^2, summed in float64."""
    return float(np.square(one_NE.T @ other_ND, dtype=np.float64).sum())
