"""Corpora: a round trip through the file, and errors for invalid ones."""

import fcntl
import json
import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
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
    with pytest.raises(RetortError, match="its card"):
        Corpus.open(tmp_path / "c.json")
    (tmp_path / "c.h5").write_bytes(b"not HDF5")
    with pytest.raises(RetortError, match="is not a readable corpus"):
        Corpus.open(tmp_path / "c.json")
    (tmp_path / "c.h5").unlink()
    (tmp_path / "c.index.h5").unlink()
    with pytest.raises(RetortError, match=r"c\.h5 does not exist"):
        Corpus.open(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(RetortError, match="`file` is missing"):
        Corpus.open(tmp_path / "c.json")


def test_a_locked_corpus_is_read_and_written(tmp_path: Path) -> None:
    utterances = noise_utterances(3)
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=utterances)
    with (tmp_path / "c.h5").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another program, or a file system without locks
        with pytest.raises(OSError, match="unable to lock file"):
            h5py.File(tmp_path / "c.h5")
        corpus = Corpus.open(tmp_path / "c.json")
        np.testing.assert_array_equal(corpus.samples(2), utterances[2].samples)


def test_errors_of_access_are_not_reported_as_damage(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=noise_utterances(2))
    (tmp_path / "loop.h5").symlink_to("loop.h5")
    (tmp_path / "folder.h5").mkdir()
    for name, told in (("loop.h5", "can't be read: .*symbolic links"), ("folder.h5", "is a folder or a device")):
        with pytest.raises(RetortError, match=told) as caught:
            Corpus.open(tmp_path / name)
        assert "make it again" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 100, 3_000, 20_000])
def test_a_truncated_corpus_is_damaged(kept: int, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=noise_utterances(3, shortest=9_000))
    (tmp_path / "c.h5").write_bytes((tmp_path / "c.h5").read_bytes()[:kept])
    with pytest.raises(RetortError, match=r"is not a readable corpus .*make it again"):
        Corpus.open(tmp_path / "c.json")


@pytest.mark.parametrize("what", ["samples", "utterances", "utterances/labels", "utterances/start", "utterances/id"])
def test_a_corpus_with_a_part_of_another_kind_is_damaged(what: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=noise_utterances(3))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        del file[what]
        file[what] = np.dtype("f4")  # a named type
    with pytest.raises(RetortError, match="is not a readable corpus"):
        Corpus.open(tmp_path / "c.json")


def test_a_corpus_of_another_writer_is_read(tmp_path: Path) -> None:
    """The documented format, written by plain h5py as version 0.2.0 does, with rows in any order."""
    text = h5py.string_dtype("utf-8")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["samples"] = np.arange(30, dtype=np.int16)
        table = file.create_group("utterances")
        for name, values in {"id": ["é", "b"], "split": ["dev", "train"], "speaker": ["", "s"]}.items():
            table.create_dataset(name, data=values, dtype=text)
        table["start"], table["num_samples"] = np.array([20, 0]), np.array([10, 20])
        table.create_group("labels").create_dataset("text", data=["x\ny", ""], dtype=text)
        file.attrs.update({"format_version": 1, "name": "c", "reader": "r", "digest": "1" * 64, "labels_digest": "2"})
        file.attrs["metadata"] = json.dumps({"a": [1]})
    corpus = Corpus.open(tmp_path / "c.h5")
    assert (corpus.ids, corpus.splits, corpus.speakers) == (["é", "b"], ["dev", "train"], ["", "s"])
    assert corpus.label("text") == ["x\ny", ""] and corpus.metadata == {"a": [1]}
    assert corpus.samples(0).tolist() == list(range(20, 30)) and not corpus.speakers.is_filled()
    (tmp_path / "c.json").write_text(json.dumps({"file": str(tmp_path / "c.h5"), "digest": "1" * 64}))
    assert len(Corpus.open(tmp_path / "c.json")) == 2  # without an index, which 0.2.0 does not write


def test_the_index_stands_in_for_absent_audio(tmp_path: Path) -> None:
    utterances = noise_utterances(5)
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=utterances)
    whole = Corpus.open(tmp_path / "c.json")
    assert whole.has_audio and whole.path == tmp_path / "c.h5"
    (tmp_path / "c.h5").unlink()
    index = Corpus.open(tmp_path / "c.json")
    assert not index.has_audio and index.path == tmp_path / "c.index.h5"
    assert (index.ids, index.digest) == (whole.ids, whole.digest)
    assert index.label("text") == [one.labels["text"] for one in utterances]
    np.testing.assert_array_equal(index.num_samples, whole.num_samples)
    write_corpus(tmp_path / "d.h5", name="d", reader="folder", utterances=utterances[:3])
    (tmp_path / "d.index.h5").rename(tmp_path / "c.index.h5")
    with pytest.raises(RetortError, match=r"c\.index\.h5 has digest .*its card"):
        Corpus.open(tmp_path / "c.json")


def test_labels_of_a_replaced_corpus_are_not_mixed_with_the_opened_one(tmp_path: Path) -> None:
    utterances = noise_utterances(3)
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=utterances)
    opened = Corpus.open(tmp_path / "c.json")
    changed = [replace(one, labels={"keyword": "other", "text": ""}) for one in utterances]
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=changed)
    with pytest.raises(RetortError, match="was replaced while it was in use"):
        opened.label("keyword")[0]


def test_labels_that_are_not_text_are_damage(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=noise_utterances(3))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        del file["utterances/labels/text"]
        file["utterances/labels/text"] = np.zeros(3)
    with pytest.raises(RetortError, match="is not a readable corpus"):
        list(Corpus.open(tmp_path / "c.json").label("text"))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        del file["utterances/labels/text"]
        file["utterances/labels/text"] = np.zeros(4)
    with pytest.raises(RetortError, match="column text has shape"):
        Corpus.open(tmp_path / "c.json")
