"""Writing of a corpus: samples go straight to their place in the file, and a killed writer is continued.

    NAME.h5.partial          samples from byte 65,536 on; HDF5's structure is written around them at the end
    NAME.h5.partial.jsonl    journal: a line for each source of the reader, with its row of the table or its findings

The audio is on the disk once, and memory holds one utterance and one block of rows. An utterance is safe if the journal
has its line and its samples have the checksum in that line. A writer that continues keeps all safe ones up to the first
that is not, or whose source has changed.
"""

import fcntl
import hashlib
import io
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from zlib import crc32

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from numpy.typing import NDArray

from extract.base.columns import BLOCK_ROWS, TextColumn
from extract.base.errors import RetortError
from extract.base.files import flush, in_main_tree, write_json, written_aside
from extract.base.validate import check_name, is_plain
from extract.corpus import FORMAT_VERSION, SAMPLE_RATE_HZ, index_of, read_blocks

_SAMPLES_AT = 1 << 16  # byte of the first sample; HDF5's structure before it takes 3 kB
_LEAST_ALIGNED = 1 << 12  # bytes; smaller allocations of HDF5 are blocks of its own structure
_SYNC_S = 2.0  # at most so much work is lost in a power failure; a killed process loses one utterance


@dataclass(frozen=True)
class Utterance:
    """One utterance to be written to a corpus: `samples` int16 (num_samples,), 16 kHz mono."""

    id: str
    samples: NDArray[np.int16]
    split: str
    speaker: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """Row of the table as the journal has it. checksum: CRC-32 of the samples as stored."""

    id: str
    num_samples: int
    checksum: int
    split: str
    speaker: str
    labels: dict[str, str]


def write_corpus(
    path: Path,
    *,
    name: str,
    reader: str,
    utterances: Iterable[Utterance],
    metadata: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write NAME.h5, its index and its card, each atomically; return the card. After an error no file is left.

    Arguments and errors are those of `CorpusWriter`, which can also continue a killed writer.
    """
    with CorpusWriter(path, name=name, reader=reader, resumable=False) as writer:
        for utterance in utterances:
            writer.add(utterance)
        return writer.finish(metadata or {}, record or {})


class CorpusWriter:
    """Writer of NAME.h5, NAME.index.h5 and NAME.json: `resume`, then `add` utterances, then `finish`.

    resumable: after an error or a kill, keep what is written for the next writer of this path, which must then call
    `resume`. Raises RetortError if another process writes the same corpus, for an utterance with control characters or
    other labels than the first, for a repeated id, and for an empty corpus.
    """

    def __init__(self, path: Path, *, name: str, reader: str, resumable: bool) -> None:
        self.path, self.name, self.reader, self.resumable = Path(path), name, reader, resumable
        self.position = 0  # sources that are written
        self.discarded = False  # True if `resume` found others, which have changed since
        self._file = in_main_tree(path)
        self._partial = self._file.with_name(f"{self._file.name}.partial")
        self._journal = self._file.with_name(f"{self._file.name}.partial.jsonl")
        self._lengths = array("q")  # samples of each utterance
        self._num_samples = 0
        self._journal_bytes = 0
        self._labels: tuple[str, ...] | None = None  # names, of the first utterance
        self._splits: Counter[str] = Counter()
        self._speakers: set[str] = set()
        self._digest = hashlib.sha256()
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._journal_fd = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._journal_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._journal_fd)
            raise RetortError(f"{self.path} is being written by another process; wait for its end") from None
        except OSError:  # the file system has no locks: two writers of one path are then not noticed
            pass
        self._samples_fd = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        if not self.resumable:
            self._cut()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not (self.resumable and self._lengths):
            self._partial.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)
        os.close(self._samples_fd)
        os.close(self._journal_fd)  # last: it ends the lock

    def resume(self, signatures: Iterable[str]) -> Iterator[Any]:
        """Take over what an earlier writer left; yield the findings of each source that need not be read again.

        signatures: of the sources, in the order of the reader. It ends at the first source that is not in the journal,
        has another signature there, or whose samples did not reach the disk.
        """
        try:
            # `zip` asks for a line first: signatures, which take a look at files, are asked for only where needed.
            for (line, known, found, row), signature in zip(self._entries(), signatures, strict=False):
                if known != signature:
                    break
                if row is not None:
                    samples = os.pread(self._samples_fd, 2 * row.num_samples, self._end_of_samples)
                    if len(samples) != 2 * row.num_samples or crc32(samples) != row.checksum:
                        break
                    self._count(row, samples)
                self.position += 1
                self._journal_bytes += len(line)
                yield found
        finally:
            self.discarded = os.fstat(self._journal_fd).st_size > self._journal_bytes
            self._cut()

    def add(self, utterance: Utterance | None, *, signature: str = "", found: Any = None) -> None:
        """Append one utterance; None for a source without one. found: a JSON value that `resume` gives back."""
        row = None
        if utterance is not None:
            self._check(utterance)
            samples = np.ascontiguousarray(utterance.samples, dtype="<i2").tobytes()
            row = _Row(
                id=utterance.id,
                num_samples=len(samples) // 2,
                checksum=crc32(samples),
                split=utterance.split,
                speaker=utterance.speaker,
                labels=utterance.labels,
            )
            _write_at(self._samples_fd, samples, self._end_of_samples)
            self._count(row, samples)
        line = json.dumps([signature, found, row and vars(row)]).encode() + b"\n"
        _write_at(self._journal_fd, line, self._journal_bytes)
        self._journal_bytes += len(line)
        self.position += 1
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._samples_fd)
            os.fsync(self._journal_fd)
            self._synced = time.monotonic()

    def finish(self, metadata: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """Complete the corpus and return its card. record: the reader's counts, such as dropped files, for the card.

        The audio gets its name last: until then the partial file and the journal can be continued.
        """
        if not self._lengths:
            raise RetortError("the corpus would be empty: the reader found no utterance")
        card = self._write_structure(metadata)
        os.fsync(self._samples_fd)
        with (
            written_aside(index_of(self.path)) as aside,
            h5py.File(self._partial, "r", locking=False) as whole,
            h5py.File(aside, "w", locking=False) as index,
        ):
            whole.copy("utterances", index)
            index.attrs.update(whole.attrs)
        card |= {"file": self.path.as_posix(), "record": record}
        write_json(self.path.with_suffix(".json"), card)
        self._partial.replace(self._file)
        self._journal.unlink()
        flush(self._file.parent)
        return card

    @property
    def _end_of_samples(self) -> int:
        return _SAMPLES_AT + 2 * self._num_samples

    def _count(self, row: _Row, samples: bytes) -> None:
        """Count an utterance whose samples are in the file."""
        self._digest.update(f"{row.id}\0{row.num_samples}\0".encode())
        self._digest.update(samples)
        self._lengths.append(row.num_samples)
        self._num_samples += row.num_samples
        self._splits[row.split] += 1
        self._speakers.add(row.speaker)
        if self._labels is None:
            self._labels = tuple(row.labels)

    def _cut(self) -> None:
        """Remove what lies behind the utterances that count."""
        os.ftruncate(self._samples_fd, self._end_of_samples)
        os.ftruncate(self._journal_fd, self._journal_bytes)

    def _check(self, utterance: Utterance) -> None:
        if not is_plain(utterance.id):
            raise RetortError(f"utterance id {utterance.id!r} is empty or holds control characters; give it another")
        if self._labels is None:
            for label in utterance.labels:
                check_name(label, where="a label's name")
        elif set(utterance.labels) != set(self._labels):
            raise RetortError(
                f"utterance {utterance.id!r} has labels {sorted(utterance.labels)}, expected those of the first, "
                f"{sorted(self._labels)}"
            )
        for name, text in {"split": utterance.split, "speaker": utterance.speaker, **utterance.labels}.items():
            if text and not is_plain(text.replace("\n", " ").replace("\t", " ")):
                raise RetortError(
                    f"utterance {utterance.id!r}: its {name} {text!r} holds control characters or invalid UTF-8; "
                    "remove them"
                )

    def _entries(self) -> Iterator[tuple[bytes, str, Any, _Row | None]]:
        """Yield the journal's whole lines, parsed: signature, findings, row. It ends at a damaged line."""
        with self._journal.open("rb") as lines:
            for line in lines:
                try:
                    signature, found, row = json.loads(line)
                    parsed = None if row is None else _Row(**row)
                except (ValueError, TypeError):
                    return
                if not line.endswith(b"\n"):
                    return
                yield line, signature, found, parsed

    def _blocks(self) -> Iterator[list[_Row]]:
        """Yield the journal's rows in blocks."""
        block = []
        for *_, row in self._entries():
            if row is not None:
                block.append(row)
            if len(block) == BLOCK_ROWS:
                yield block
                block = []
        yield block

    def _write_structure(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Write HDF5's structure and the table around the samples; return their part of the card."""
        with (
            _AroundSamples(self._partial, self._end_of_samples) as around,
            h5py.File(
                around,
                "w",
                alignment_threshold=max(2 * self._num_samples, _LEAST_ALIGNED),
                alignment_interval=_SAMPLES_AT,
            ) as file,
        ):
            self._place_samples(file)
            table = self._write_table(file)
            if (twice := TextColumn.of(read_blocks(table["id"])).repeated()) is not None:
                raise RetortError(f"utterance id {twice!r} occurs twice; ids must be unique in a corpus")
            card = {
                "format_version": FORMAT_VERSION,
                "name": self.name,
                "reader": self.reader,
                "digest": self._digest.hexdigest(),
                "labels_digest": labels_digest(table, metadata),
                "num_utterances": len(self._lengths),
                "num_samples": self._num_samples,
                "hours": round(self._num_samples / SAMPLE_RATE_HZ / 3600, 4),
                "splits": dict(sorted(self._splits.items())),
                "num_speakers": len(self._speakers),
                "labels": sorted(table["labels"]),
            }
            for key in ("format_version", "name", "reader", "digest", "labels_digest"):
                file.attrs[key] = card[key]
            file.attrs["sample_rate_hz"] = SAMPLE_RATE_HZ
            file.attrs["metadata"] = json.dumps(metadata, sort_keys=True)
        return card

    def _place_samples(self, file: h5py.File) -> None:
        """Make the data set `samples` where the samples are."""
        few = os.pread(self._samples_fd, _LEAST_ALIGNED, _SAMPLES_AT)
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        space = h5s.create_simple((self._num_samples,))
        offset = h5d.create(file.id, b"samples", h5t.STD_I16LE, space, properties).get_offset()
        if 2 * self._num_samples < _LEAST_ALIGNED:  # HDF5 puts small data among its structure
            file["samples"][:] = np.frombuffer(few, dtype="<i2", count=self._num_samples)
        else:
            assert offset == _SAMPLES_AT, offset

    def _write_table(self, file: h5py.File) -> h5py.Group:
        """Write the table from the journal and return it."""
        text, rows = h5py.string_dtype("utf-8"), len(self._lengths)
        table = file.create_group("utterances")
        columns = {name: table.create_dataset(name, (rows,), text) for name in ("id", "split", "speaker")}
        lengths = np.array(self._lengths, dtype=np.int64)
        table.create_dataset("start", data=np.cumsum(lengths) - lengths)
        table.create_dataset("num_samples", data=lengths)
        group, assured = table.create_group("labels"), self._labels or ()
        labels = {name: group.create_dataset(name, (rows,), text) for name in assured}
        first = 0
        for block in self._blocks():
            here = slice(first, first + len(block))
            for name, column in columns.items():
                column[here] = [getattr(row, name) for row in block]
            for name, column in labels.items():
                column[here] = [row.labels[name] for row in block]
            first += len(block)
        assert first == rows, "the journal was changed by another process"
        return table


class _AroundSamples(io.FileIO):
    """File that HDF5 takes for a new one while it holds samples, which end at byte `end`.

    HDF5 has no way to pass on that a disk is full: an error of the system is kept, and raised at the end of the `with`.
    """

    def __init__(self, path: Path, end: int) -> None:
        super().__init__(path, "r+b")
        self._samples_end, self._size = end, 0
        self._error: OSError | None = None

    def __exit__(self, *exception: object) -> None:
        self.close()
        if self._error is not None:
            raise self._error  # what HDF5 then raised, if it did, is a consequence

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:  # HDF5 asks for the size of the file, and reads one that has content
            offset, whence = self._size + offset, os.SEEK_SET
        return super().seek(offset, whence)

    def write(self, data: Any) -> int:
        start, size = self.tell(), len(data)
        try:
            _write_at(self.fileno(), data, start)
        except OSError as error:
            self._error = error
        super().seek(start + size)
        self._size = max(self._size, start + size)
        return size

    def truncate(self, size: int | None = None) -> int:
        assert size is not None
        self._size = size
        # HDF5 sets the size before the samples are in its structure, too.
        return super().truncate(max(size, self._samples_end))


def labels_digest(table: h5py.Group, metadata: dict[str, Any]) -> str:
    """Return `sha256_json([splits, speakers, labels, metadata])` of a table, whose columns are read in blocks."""
    digest = hashlib.sha256()

    def add(column: h5py.Dataset) -> None:
        separator = "["
        for block in read_blocks(column):
            values = json.dumps([value.decode() for value in block], separators=(",", ":"))
            digest.update(f"{separator}{values[1:-1]}".encode())
            separator = ","
        digest.update(b"]")

    digest.update(b"[")
    for name in ("split", "speaker"):
        add(table[name])
        digest.update(b",")
    separator = "{"
    for name in sorted(table["labels"]):
        digest.update(f"{separator}{json.dumps(name)}:".encode())
        add(table["labels"][name])
        separator = ","
    digest.update(b"}," if len(table["labels"]) else b"{},")
    digest.update(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode() + b"]")
    return digest.hexdigest()


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset: the system may write a part of them."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
