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
from extract.corpus import Corpus, _open_without_lock, write_corpus
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
    with h5py.File(tmp_path / "d.h5", "w"), _open_without_lock(tmp_path / "e.h5", "w") as file:
        file["x"] = 1


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
