"""Layers of two stores compared: what linear CKA is, which frames it is taken over, and who is left out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from extract.corpus import Corpus
from extract.stats import measure
from extract.store.reader import StoreReader
from pipelines.report import similarity
from pipelines.report.similarity import choose_utterances, linear_cka, measure_similarity, read_frames, unit_energy
from tests.evaluate_stores import Hidden, make_corpus, make_store

NUM_FRAMES = [40 + 3 * number for number in range(20)]


def hidden_of(seed: int, *, layers: int, dim: int) -> Hidden:
    """Layers that mix a signal, which all seeds share, with noise of their own: more of it in later layers."""
    mixing = np.random.default_rng(seed).normal(size=(layers, 6, dim))

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        signal_TD = np.random.default_rng(index).normal(size=(frames, 6))
        noise_LTD = np.random.default_rng([seed, index]).normal(size=(layers, frames, dim))
        states_LTD: NDArray[np.float32] = (
            signal_TD @ mixing + np.arange(layers)[:, None, None] * noise_LTD + 5
        ).astype(np.float32)
        return states_LTD

    return hidden


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus.open(make_corpus(tmp_path, labels={}, splits=["train", "test"] * 10, num_frames=NUM_FRAMES))


def add_store(folder: Path, name: str, hidden: Hidden, *, keep: tuple[str, ...] = ("frames", "pooled")) -> Path:
    made = make_store(folder / name, folder / "tiny.json", hidden, keep=keep)
    manifest = folder / f"{name}.json"
    manifest.write_bytes(made.read_bytes())
    return manifest


def test_a_teacher_beside_itself_is_what_the_statistics_of_its_store_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_corpus(tmp_path, labels={}, splits=["test"] * 20, num_frames=NUM_FRAMES)
    manifest = add_store(tmp_path, "teacher", hidden_of(1, layers=4, dim=10))
    monkeypatch.setattr(similarity, "FRAMES_EACH", max(NUM_FRAMES))  # all of them
    found = measure_similarity(tmp_path, ["teacher"], Corpus.open(card), "test").by_student["teacher"]
    np.testing.assert_allclose(found.cka_SL, measure(StoreReader.open(manifest)).cka_LL, rtol=1e-4)
    assert found.layers == found.teacher_layers == (0, 1, 2, 3)


def test_cka_is_that_of_the_gram_matrices_and_blind_to_rotation_and_scale() -> None:
    generator = np.random.default_rng(3)
    one_LND, other_LND = generator.normal(size=(2, 60, 5)) + 3, generator.normal(size=(3, 60, 7))
    other_LND[1, :, :5] += one_LND[1]
    found = linear_cka(unit_energy(one_LND.astype(np.float32)), unit_energy(other_LND.astype(np.float32)))
    centre_NN = np.eye(60) - 1 / 60
    grams = [[centre_NN @ layer @ layer.T @ centre_NN for layer in layers] for layers in (one_LND, other_LND)]
    expected = [[(x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()) for y in grams[1]] for x in grams[0]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    rotation = np.linalg.qr(generator.normal(size=(7, 7)))[0]
    turned = linear_cka(
        unit_energy((7 * other_LND @ rotation + 2).astype(np.float32)), unit_energy(other_LND.astype(np.float32))
    )
    np.testing.assert_allclose(np.diag(turned), 1, rtol=1e-5)


def test_a_layer_that_never_varies_is_like_none(tmp_path: Path) -> None:
    layers_LND = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)
    layers_LND[1] = 2.5
    found = linear_cka(unit_energy(layers_LND), unit_energy(layers_LND))
    assert found[0, 0] == pytest.approx(1) and np.isnan(found[[0, 1, 1], [1, 0, 1]]).all()


def test_frames_are_the_same_of_both_spread_over_utterances_of_the_split(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(index: int, frames: int) -> NDArray[np.float32]:
        return np.stack([np.full(frames, index), np.arange(frames)], axis=1)[None].astype(np.float32)

    reader = StoreReader.open(add_store(tmp_path, "teacher", counting), corpus)
    monkeypatch.setattr(similarity, "NUM_UTTERANCES", 5)
    monkeypatch.setattr(similarity, "FRAMES_EACH", 16)
    indices = choose_utterances(reader, corpus, "test")
    assert indices.tolist() == [1, 5, 9, 13, 17]
    frames_ND = read_frames(reader, indices)[0]
    assert frames_ND[:, 0].tolist() == np.repeat(indices, 16).tolist()
    for index, part_ND in zip(indices, np.split(frames_ND, 5), strict=True):
        steps = np.diff(part_ND[:, 1])
        assert part_ND[0, 1] == 0 and set(steps) <= {NUM_FRAMES[index] // 16, NUM_FRAMES[index] // 16 + 1}


def test_students_that_cannot_be_compared_are_left_out_and_named(tmp_path: Path, corpus: Corpus) -> None:
    add_store(tmp_path, "teacher", hidden_of(1, layers=3, dim=10))
    add_store(tmp_path, "small", hidden_of(1, layers=2, dim=10))  # the teacher's own first layers
    add_store(tmp_path, "pooled", hidden_of(2, layers=2, dim=6), keep=("pooled",))
    slow = add_store(tmp_path, "slow", hidden_of(2, layers=2, dim=6))
    slow.write_text(json.dumps(json.loads(slow.read_text()) | {"hop_samples": 640}))
    found = measure_similarity(tmp_path, ["pooled", "small", "none", "slow"], corpus, "test")
    assert list(found.by_student) == ["small"]
    cka_SL = found.by_student["small"].cka_SL
    np.testing.assert_allclose(np.diag(cka_SL), 1, atol=1e-3)
    assert cka_SL.shape == (2, 3) and cka_SL[[0, 1, 0], [1, 0, 2]].max() < 0.9
    expected = ["pooled is left out: .* no frames", "none is left out: .* is missing", "slow .* 640 samples apart"]
    assert all(re.search(*pair) for pair in zip(expected, found.notes, strict=True))
    assert found.heard == f"{sum(NUM_FRAMES[1::2]):,} frames of 10 utterances of tiny, split test"


def test_without_the_teachers_frames_nothing_is_compared(tmp_path: Path, corpus: Corpus) -> None:
    add_store(tmp_path, "small", hidden_of(2, layers=2, dim=6))
    found = measure_similarity(tmp_path, ["small"], corpus, "test")
    assert not found.by_student and "teacher.json is missing" in found.notes[0]
