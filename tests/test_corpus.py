"""corpus.h5: what goes in comes out, and what does not fit is named."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from extract.corpus import Corpus, write_corpus
from extract.errors import RetortError
from tests.conftest import noise_utterances


def test_round_trip(tmp_path: Path) -> None:
    utterances = noise_utterances(7)
    card = write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=iter(utterances))
    corpus = Corpus.open(tmp_path / "c.json")
    assert corpus.ids == [one.id for one in utterances]
    assert corpus.splits == [one.split for one in utterances]
    assert corpus.label("keyword") == [one.labels["keyword"] for one in utterances]
    for index, one in enumerate(utterances):
        np.testing.assert_array_equal(corpus.samples(index), one.samples)
        np.testing.assert_array_equal(corpus.waveform(index) * 32_768, one.samples.astype(np.float32))
    assert card["num_samples"] == sum(len(one.samples) for one in utterances)
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["samples"].chunks is None  # contiguous
        assert file["samples"].dtype == np.int16


def test_digest_covers_samples_and_ids_but_not_labels(tmp_path: Path) -> None:
    utterances = noise_utterances(3)

    def digests(name: str, changed: list[object]) -> tuple[str, str]:
        card = write_corpus(tmp_path / f"{name}.h5", name="c", reader="folder", utterances=changed)  # type: ignore[arg-type]
        return card["digest"], card["labels_digest"]

    original = digests("a", [*utterances])
    louder = replace(utterances[0], samples=utterances[0].samples + np.int16(1))
    other_split = replace(utterances[0], split="dev")
    renamed = replace(utterances[0], id="other")
    assert digests("b", [*utterances]) == original
    assert digests("c", [louder, *utterances[1:]])[0] != original[0]
    assert digests("d", [renamed, *utterances[1:]])[0] != original[0]
    assert digests("e", [other_split, *utterances[1:]])[0] == original[0]
    assert digests("e", [other_split, *utterances[1:]])[1] != original[1]


def test_a_corpus_travels_to_another_process(corpus: Corpus) -> None:
    corpus.samples(0)  # the handle is open
    there = pickle.loads(pickle.dumps(corpus))  # noqa: S301
    np.testing.assert_array_equal(there.samples(3), corpus.samples(3))


def test_what_is_wrong_is_named(tmp_path: Path, corpus: Corpus) -> None:
    one = noise_utterances(2)
    with pytest.raises(RetortError, match="'u000' occurs twice"):
        write_corpus(tmp_path / "a.h5", name="a", reader="folder", utterances=[one[0], one[0]])
    with pytest.raises(RetortError, match="would be empty"):
        write_corpus(tmp_path / "a.h5", name="a", reader="folder", utterances=[])
    with pytest.raises(RetortError, match="has labels"):
        write_corpus(tmp_path / "a.h5", name="a", reader="folder", utterances=[one[0], replace(one[1], labels={})])
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    with pytest.raises(RetortError, match=r"has no label 'phones'; it has keyword, text"):
        corpus.label("phones")
    with pytest.raises(RetortError, match=r"has no split 'valid'; it has dev, test, train"):
        corpus.select("valid")


def test_a_card_and_its_audio_must_agree(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=noise_utterances(2))
    write_corpus(tmp_path / "d.h5", name="d", reader="folder", utterances=noise_utterances(3))
    (tmp_path / "d.h5").rename(tmp_path / "c.h5")
    with pytest.raises(RetortError, match="its card says"):
        Corpus.open(tmp_path / "c.json")
    (tmp_path / "c.h5").write_bytes(b"not HDF5")
    with pytest.raises(RetortError, match="is no readable corpus"):
        Corpus.open(tmp_path / "c.json")
    (tmp_path / "c.h5").unlink()
    with pytest.raises(RetortError, match=r"c\.h5 does not exist"):
        Corpus.open(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(RetortError, match="is no corpus card"):
        Corpus.open(tmp_path / "c.json")
