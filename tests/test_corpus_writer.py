"""Writing of corpora: killed anywhere and continued, with little memory and one copy of the audio on the disk."""

import errno
import json
import shutil
import signal
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.base.files import sha256_json
from extract.corpus import Corpus
from extract.corpus_writer import CorpusWriter, Utterance, write_corpus
from pipelines.demo.recording import write_audio
from pipelines.readers import read_corpus
from tests.conftest import noise_utterances
from tests.corpus_crashes import killed_at, write_resumably, write_up_to
from tests.processes import WARM, Command, run_command

DESCRIPTORS = Path("/proc/self/fd")
LEFTOVERS = ["c.h5.partial", "c.h5.partial.jsonl"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a reader of a corpus sees, by its card and by its index."""
    corpus, index = Corpus.open(folder / "c.json"), Corpus.open(folder / "c.index.h5")
    card = json.loads((folder / "c.json").read_text())
    assert not index.has_audio and (index.digest, index.labels_digest) == (card["digest"], card["labels_digest"])
    return {
        "card": card | {"file": ""},
        "index": (folder / "c.index.h5").read_bytes(),  # DVC compares it
        "samples": [corpus.samples(row).tolist() for row in range(len(corpus))],
        "columns": [
            [list(one.ids), list(one.splits), list(one.speakers), one.start.tolist(), one.num_samples.tolist(),
             {name: list(column) for name, column in one.labels.items()}, one.metadata]
            for one in (corpus, index)
        ],
    }  # fmt: skip


def test_killed_at_every_change_of_a_file_the_corpus_is_the_same(tmp_path: Path) -> None:
    utterances = noise_utterances(3, shortest=2_000, longest=4_000)
    write_corpus(tmp_path / "old.h5", name="c", reader="folder", utterances=utterances[:1])
    (tmp_path / "whole").mkdir()
    assert write_resumably(tmp_path / "whole/c.h5", utterances) == 0
    expected = contents(tmp_path / "whole")
    taken_over = []
    for call in chain(range(16), range(16, 1_000, 9)):  # most of the later ones are of HDF5's structure
        folder = tmp_path / str(call)
        folder.mkdir()
        if call % 2:  # an older corpus of this name
            for name in ("h5", "json", "index.h5"):
                shutil.copy(tmp_path / f"old.{name}", folder / f"c.{name}")
        process = WARM.Process(target=killed_at, args=(call, folder / "c.h5", utterances))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        taken_over.append(write_resumably(folder / "c.h5", utterances))
        assert names(folder) == ["c.h5", "c.index.h5", "c.json"]
        assert contents(folder) == expected, call
    assert call > 50 and len(taken_over) > 20
    # Never fewer than with an earlier kill, but for the last: then the corpus had its name and was complete.
    assert taken_over[:-1] == sorted(taken_over[:-1]) and set(taken_over) == {0, 1, 2, 3}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of 400 files, of which one is clipped, one cannot be read, and all are at 8 kHz."""
    generator = np.random.default_rng(0)
    for number in range(400):
        samples = generator.normal(size=1_600 + number).astype(np.float32) / 10
        if number == 5:
            samples[100:120] = 1
        write_audio(tmp_path / f"data/u{number:03d}.wav", samples, 8_000)
    (tmp_path / "data/u007.wav").write_bytes(b"RIFF")
    (tmp_path / "data/metadata.csv").write_text(
        "file,split,text\n" + "".join(f"u{number:03d}.wav,train,N {number}\n" for number in range(400))
    )
    return tmp_path / "data"


def test_a_killed_reader_continues_with_its_findings(data: Path, tmp_path: Path) -> None:
    read = ("pipelines", "corpus", "folder", str(data), "--skip-bad", "--out")
    whole = run_command(*read, str(tmp_path / "whole/c.h5"), check=True)
    journal = tmp_path / "killed/c.h5.partial.jsonl"
    for _ in range(20):
        command = Command(*read, str(tmp_path / "killed/c.h5"))
        while command.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 100):
            pass
        command.kill()
        command.wait()
        if command.returncode == -signal.SIGKILL:
            break
        shutil.rmtree(tmp_path / "killed")
    assert names(tmp_path / "killed") == LEFTOVERS
    written = journal.read_bytes().count(b"\n")
    assert 100 < written < 400
    again = run_command(*read, str(tmp_path / "killed/c.h5"), check=True)
    assert f"continuing after the {written} of 400 files" in again.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    card = json.loads((tmp_path / "killed/c.json").read_text())
    assert len(card["record"]["dropped"]) == 1 and card["num_utterances"] == 399
    assert "clipped" in json.dumps(card["record"]["noted"])
    assert again.stdout.partition(": ")[2] == whole.stdout.partition(": ")[2]


def test_files_are_read_again_from_the_first_that_changed(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "c.h5"
    with pytest.raises(RetortError, match="1 of 400 files can't be used"):
        read_corpus("folder", data, out)
    assert names(tmp_path) == [*LEFTOVERS, "data"]  # nothing that was read is lost
    capsys.readouterr()
    shutil.copy(data / "u008.wav", data / "u007.wav")
    card = read_corpus("folder", data, out)
    assert "continuing after the 7 of 400 files" in capsys.readouterr().err
    assert card["num_utterances"] == 400
    assert read_corpus("folder", data, tmp_path / "other.h5")["digest"] == card["digest"]
    table = data / "metadata.csv"
    for text, told in (("N 399,", "continuing after"), ("N 0\n", "starting anew")):
        (data / "u399.wav").unlink(missing_ok=True)
        with pytest.raises(RetortError, match="1 of 400 files"):
            read_corpus("folder", data, out)
        table.write_text(table.read_text().replace(text, "changed\n"))
        capsys.readouterr()
        with pytest.raises(RetortError, match="1 of 400 files"):
            read_corpus("folder", data, out)
        assert told in capsys.readouterr().err


def test_a_second_writer_is_refused_and_a_kill_ends_the_lock(tmp_path: Path) -> None:
    utterances = noise_utterances(3)
    with (
        CorpusWriter(tmp_path / "c.h5", name="c", reader="folder", resumable=True) as first,
        pytest.raises(RetortError, match="is being written by another process"),
    ):
        list(first.resume([]))
        first.add(utterances[0], signature=utterances[0].id, found={"at": 0})
        write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=utterances)
    assert names(tmp_path) == LEFTOVERS
    assert write_resumably(tmp_path / "c.h5", utterances) == 1


def test_samples_that_did_not_reach_the_disk_are_written_again(tmp_path: Path) -> None:
    utterances = noise_utterances(5)
    whole, path = tmp_path / "whole.h5", tmp_path / "c.h5"
    card = write_corpus(whole, name="c", reader="folder", utterances=utterances, metadata={"lexicon": {"é": "x"}})
    with CorpusWriter(path, name="c", reader="folder", resumable=True) as writer:
        list(writer.resume([]))
        for position, one in enumerate(utterances):
            writer.add(one, signature=one.id, found={"at": position})
    with (tmp_path / "c.h5.partial").open("r+b") as file:  # as after a power failure: a page of zeros
        file.seek(65_536 + 2 * (len(utterances[0].samples) + len(utterances[1].samples)) + 100)
        file.write(bytes(64))
    assert write_resumably(path, utterances) == 2
    assert json.loads((tmp_path / "c.json").read_text())["digest"] == card["digest"]


def numbered(count: int) -> Iterator[Utterance]:
    for number in range(count):
        labels = {"text": f"{number} " * 30, "phones": "AA1 B " * 60}
        yield Utterance(f"{number:012d}", np.full(10, number % 99, dtype=np.int16), "train", f"s{number % 50}", labels)


def test_memory_does_not_grow_with_utterances(tmp_path: Path) -> None:
    peaks = []
    for count in (2_500, 4_500):
        tracemalloc.start()
        write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=numbered(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2_000 * 100  # 8 bytes of length, and an id while all are compared; a row takes 1 kB
    tracemalloc.start()
    corpus = Corpus.open(tmp_path / "c.json")
    assert len(corpus.select("train")) == 4_500
    opened = tracemalloc.get_traced_memory()[1]
    assert corpus.label("text")[4_499] == "4499 " * 30
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 4_500 * 150 < read  # labels are read when they are asked for


def test_the_audio_is_on_the_disk_once(tmp_path: Path) -> None:
    before = len(list(DESCRIPTORS.iterdir()))

    def held() -> int:
        return sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())

    most = 0

    def watched() -> Iterator[Utterance]:
        nonlocal most
        for one in noise_utterances(40, shortest=60_000, longest=80_000):
            yield one
            most = max(most, held())
            unnamed = [link for link in DESCRIPTORS.iterdir() if link.is_symlink() and is_deleted_in(link, tmp_path)]
            assert not unnamed  # files without a name take space, too

    card = write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=watched())
    audio = 2 * card["num_samples"]
    assert audio * 0.9 < most < audio + 200_000 and held() < audio + 200_000
    assert len(list(DESCRIPTORS.iterdir())) == before


def is_deleted_in(link: Path, folder: Path) -> bool:
    target = str(link.readlink())
    return target.startswith(str(folder)) and target.endswith("(deleted)")


@pytest.mark.parametrize("full_in", ["samples", "structure"])
def test_a_full_disk_keeps_what_was_written(full_in: str, tmp_path: Path) -> None:
    utterances = noise_utterances(8, shortest=20_000)
    size = 150_000 if full_in == "samples" else 65_536 + 2 * sum(len(one.samples) for one in utterances) + 1_000
    process = WARM.Process(target=write_up_to, args=(size, tmp_path / "c.h5", utterances))
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG
    assert names(tmp_path) == LEFTOVERS
    taken_over = write_resumably(tmp_path / "c.h5", utterances)
    assert 0 < taken_over < 8 if full_in == "samples" else taken_over == 8
    expected = write_corpus(tmp_path / "d.h5", name="c", reader="folder", utterances=utterances)["digest"]
    assert Corpus.open(tmp_path / "c.json").digest == expected


def test_the_labels_digest_is_that_of_the_lists(tmp_path: Path) -> None:
    utterances = [
        replace(one, split=f"s{row % 2}", labels={"b": f"zwölf {row}\n", "a": ""}, speaker="日本")
        for row, one in enumerate(noise_utterances(5))
    ]
    for rows in (utterances, [replace(one, labels={}) for one in utterances]):
        card = write_corpus(tmp_path / "c.h5", name="c", reader="folder", utterances=rows, metadata={"z": [1], "é": 2})
        labels = {name: [one.labels[name] for one in rows] for name in rows[0].labels}
        columns = [[one.split for one in rows], [one.speaker for one in rows], labels, {"é": 2, "z": [1]}]
        assert card["labels_digest"] == sha256_json(columns)


@pytest.mark.parametrize("num_samples", [1, 400, 2_000, 2_047, 2_048, 2_049, 40_000])
def test_corpora_of_any_size_are_plain_hdf5(num_samples: int, tmp_path: Path) -> None:
    samples = np.arange(num_samples, dtype=np.int16)
    write_corpus(tmp_path / "c.h5", name="c", reader="r", utterances=[Utterance("a", samples, "train", "")])
    with h5py.File(tmp_path / "c.h5") as file:
        np.testing.assert_array_equal(file["samples"][:], samples)
        assert file["samples"].chunks is None and file["samples"].dtype == "<i2"
        assert file["utterances/id"].asstr()[:].tolist() == ["a"]
        assert dict(file.attrs)["sample_rate_hz"] == 16_000
    np.testing.assert_array_equal(Corpus.open(tmp_path / "c.json").samples(0), samples)
