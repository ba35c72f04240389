"""Comparison of two stores: the value of linear CKA, the frames it is taken over, and stores that can't be compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from extract import compare
from extract.__main__ import main
from extract.base.errors import RetortError
from extract.compare import choose_utterances, cka_of_frames, compare_stores, read_frames
from extract.corpus import Corpus
from extract.measures import CompareFile
from extract.stats import measure
from extract.store.reader import StoreReader
from tests.evaluate_stores import Hidden, make_corpus, make_store

NUM_FRAMES = [40 + 3 * number for number in range(20)]


def hidden_of(seed: int, *, layers: int, dim: int) -> Hidden:
    """Layers that mix a signal, common to all seeds, with noise of the seed: more noise in later layers."""
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
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path, labels={}, splits=["train", "test"] * 10, num_frames=NUM_FRAMES)


def add_store(folder: Path, name: str, hidden: Hidden, *, keep: tuple[str, ...] = ("frames", "pooled")) -> Path:
    made = make_store(folder / name, folder / "tiny.json", hidden, keep=keep)
    manifest = folder / f"{name}.json"
    manifest.write_bytes(made.read_bytes())
    return manifest


def matrix(found: CompareFile) -> NDArray[np.float64]:
    return np.array(found.linear_cka, dtype=np.float64)


def test_a_store_compared_with_itself_equals_the_statistics_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_corpus(tmp_path, labels={}, splits=["test"] * 20, num_frames=NUM_FRAMES)
    manifest = add_store(tmp_path, "teacher", hidden_of(1, layers=4, dim=10))
    monkeypatch.setattr(compare, "FRAMES_EACH", max(NUM_FRAMES))  # all of them
    found = compare_stores(manifest, manifest, card, "test")
    np.testing.assert_allclose(matrix(found), measure(StoreReader.open(manifest)).cka_LL, rtol=1e-4)
    assert found.student_layers == found.teacher_layers == (0, 1, 2, 3)


def test_cka_equals_that_of_gram_matrices_and_ignores_rotation_and_scale() -> None:
    generator = np.random.default_rng(3)
    one_LND, other_LND = generator.normal(size=(2, 60, 5)) + 3, generator.normal(size=(3, 60, 7))
    other_LND[1, :, :5] += one_LND[1]
    found = cka_of_frames(one_LND.astype(np.float32), other_LND.astype(np.float32))
    centre_NN = np.eye(60) - 1 / 60
    grams = [[centre_NN @ layer @ layer.T @ centre_NN for layer in layers] for layers in (one_LND, other_LND)]
    expected = [[(x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()) for y in grams[1]] for x in grams[0]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    rotation = np.linalg.qr(generator.normal(size=(7, 7)))[0]
    rotated = cka_of_frames((7 * other_LND @ rotation + 2).astype(np.float32), other_LND.astype(np.float32))
    np.testing.assert_allclose(np.diag(rotated), 1, rtol=1e-5)


def test_a_constant_layer_has_no_similarity(tmp_path: Path, corpus: Path) -> None:
    layers_LND = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)
    layers_LND[1] = 2.5
    found = cka_of_frames(layers_LND, layers_LND)
    assert found[0, 0] == pytest.approx(1) and np.isnan(found[[0, 1, 1], [1, 0, 1]]).all()

    def constant(index: int, frames: int) -> NDArray[np.float32]:
        return np.full((1, frames, 4), 2.5, dtype=np.float32)

    manifest = add_store(tmp_path, "constant", constant)
    assert compare_stores(manifest, manifest, corpus, "test").linear_cka == ((None,),)


def test_frames_are_spread_over_the_utterances_of_the_split(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(index: int, frames: int) -> NDArray[np.float32]:
        return np.stack([np.full(frames, index), np.arange(frames)], axis=1)[None].astype(np.float32)

    opened = Corpus.open(corpus)
    reader = StoreReader.open(add_store(tmp_path, "teacher", counting), opened)
    monkeypatch.setattr(compare, "NUM_UTTERANCES", 5)
    monkeypatch.setattr(compare, "FRAMES_EACH", 16)
    indices = choose_utterances(reader, reader, opened.select("test"))
    assert indices.tolist() == [1, 5, 9, 13, 17]
    frames_ND = read_frames(reader, indices)[0]
    assert frames_ND[:, 0].tolist() == np.repeat(indices, 16).tolist()
    for index, part_ND in zip(indices, np.split(frames_ND, 5), strict=True):
        steps = np.diff(part_ND[:, 1])
        assert part_ND[0, 1] == 0 and set(steps) <= {NUM_FRAMES[index] // 16, NUM_FRAMES[index] // 16 + 1}


def test_a_student_of_the_teachers_first_layers_has_them_on_its_diagonal(tmp_path: Path, corpus: Path) -> None:
    teacher = add_store(tmp_path, "teacher", hidden_of(1, layers=3, dim=10))
    student = add_store(tmp_path, "student", hidden_of(1, layers=2, dim=10))
    cka_SL = matrix(compare_stores(teacher, student, corpus, "test"))
    np.testing.assert_allclose(np.diag(cka_SL), 1, atol=1e-3)
    assert cka_SL.shape == (2, 3) and cka_SL[[0, 1, 0], [1, 0, 2]].max() < 0.9


def test_stores_that_cannot_be_compared_give_a_record_with_the_reason(tmp_path: Path, corpus: Path) -> None:
    teacher = add_store(tmp_path, "teacher", hidden_of(1, layers=3, dim=10))
    pooled = add_store(tmp_path, "pooled", hidden_of(2, layers=2, dim=6), keep=("pooled",))
    slow = add_store(tmp_path, "slow", hidden_of(2, layers=2, dim=6))
    slow.write_text(json.dumps(json.loads(slow.read_text()) | {"hop_samples": 640}))
    for student, reason in ((pooled, "pooled.json keeps pooled and no frames"), (slow, "640 samples")):
        found = compare_stores(teacher, student, corpus, "test")
        assert found.problem and reason in found.problem
        assert found.linear_cka == () and found.num_frames == 0 and found.teacher_layers == (0, 1, 2)
    with pytest.raises(RetortError, match="no split 'dev'"):
        compare_stores(teacher, pooled, corpus, "dev")


def test_the_command_writes_the_record_that_reads_back(tmp_path: Path, corpus: Path) -> None:
    teacher = add_store(tmp_path, "teacher", hidden_of(1, layers=3, dim=10))
    student = add_store(tmp_path, "student", hidden_of(2, layers=2, dim=6))
    out = tmp_path / "measures/compare/student.json"
    arguments = ["compare", str(teacher), str(student), "--corpus", str(corpus), "--out", str(out)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert f"{sum(NUM_FRAMES[1::2]):,} frames of 10 utterances of tiny, split test" in done.output
    assert CompareFile.read(out) == compare_stores(teacher, student, corpus, "test")
    assert CompareFile.read(out).student_digest == StoreReader.open(student).digest


def test_a_damaged_record_is_refused_with_its_field(tmp_path: Path, corpus: Path) -> None:
    teacher = add_store(tmp_path, "teacher", hidden_of(1, layers=3, dim=10))
    value = compare_stores(teacher, teacher, corpus, "test").to_dict()
    path = tmp_path / "one.json"
    for change, named in (
        ({"format_version": 9}, "format_version: got 9"),
        ({"linear_cka": [[1.0]]}, "linear_cka: expected a row"),
        ({"split": 3}, r"one\.json: split: got 3"),
    ):
        with pytest.raises(RetortError, match=named):
            CompareFile.from_dict(json.loads(json.dumps(value | change)), path=path)
    with pytest.raises(RetortError, match=r"`teacher` is missing.*extract compare"):
        CompareFile.from_dict({"format_version": 1}, path=path)
