"""Corpus: one HDF5 file of utterances with labels, read by every stage.

    /samples                                int16 (samples,), 16 kHz mono, all utterances end to end
    /utterances/id, split, speaker          UTF-8 strings (utterances,)
    /utterances/start, num_samples          int64 (utterances,)
    /utterances/labels/NAME                 UTF-8 strings (utterances,): text, phones, keyword, …

Beside NAME.h5 lie its card NAME.json with digests and counts, and its index NAME.index.h5, which is the same file
without `/samples`. DVC tracks those two, because the audio may be 110 GB: a machine that has only them can train from a
store and score. `python -m pipelines corpus READER ROOT --out corpora/NAME.h5` makes all three (corpus_writer.py).
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from extract.base.columns import BLOCK_ROWS, CodedColumn, TakenColumn, TextColumn
from extract.base.errors import RetortError
from extract.base.files import in_main_tree, read_at, read_json
from extract.base.validate import check_fields, check_name

FORMAT_VERSION = 1
SAMPLE_RATE_HZ = 16_000
CUT_GRID = 3_200  # samples: long utterances are cut at multiples of 0.2 s, which is a multiple of 5, 10, 20 and 40 ms
_COLUMNS = ("id", "start", "num_samples", "split", "speaker")
_DAMAGE = (KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError)  # h5py, for a damaged file


class StoredColumn(TextColumn):
    """Text column of a corpus file, read when it is first used. Raises RetortError if it can't be read then."""

    def __init__(self, path: Path, name: str, rows: int, labels_digest: str) -> None:
        self.path, self.name, self.rows, self.labels_digest = path, name, rows, labels_digest

    @cached_property
    def text(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        with _described_errors(self.path), _open_file(self.path) as file:
            if file.attrs["labels_digest"] != self.labels_digest:
                raise RetortError(f"corpus {self.path} was replaced while it was in use; run the command again")
            return TextColumn.of(read_blocks(file[self.name])).text

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "text"}  # read again where it is used


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. Columns are in file order; the audio is read on demand.

    digest: of ids, lengths and samples, which decide the features. labels_digest: of splits, speakers, labels and
    metadata. metadata: facts of the whole corpus, such as a lexicon.
    """

    path: Path
    name: str
    reader: str
    digest: str
    labels_digest: str
    ids: TextColumn
    start: NDArray[np.int64]  # (utterances,), first sample in `/samples`
    num_samples: NDArray[np.int64]  # (utterances,)
    splits: CodedColumn
    speakers: TextColumn
    labels: Mapping[str, TextColumn]
    metadata: dict[str, Any]
    audio: Path | None = None  # file that the card names for the audio, where `path` is the index in its place
    cut_samples: int = 0  # longer utterances are in parts of at most so many (`cut_long`); 0: all are whole
    utterance: NDArray[np.int64] | None = None  # row of the whole corpus that a row is (a part of); None: its own

    @classmethod
    def open(cls, path: Path | str) -> "Corpus":
        """Open NAME.h5, or the file that the card NAME.json names; without that file, the index beside the card.

        Raises RetortError if the file is missing, is not a corpus, or is not the one that the card describes.
        """
        path = Path(path)
        card = None
        if path.suffix == ".json":
            value = read_json(path)
            try:
                card = check_fields({"file": str, "digest": str}, value, where=str(path))
            except RetortError as error:
                raise RetortError(f"{error}; make the corpus with `python -m pipelines corpus`") from None
            audio, index = in_main_tree(card["file"]), index_of(path)
            use_index = index.exists() and not audio.exists()
            path = index if use_index else audio
        with _described_errors(path):
            corpus = cls._read(path)
            check_name(corpus.name, where=f"{path}: name")  # folders of stores begin with it
            corpus._check_table()
        if card is not None and corpus.digest != card["digest"]:
            raise RetortError(
                f"corpus {path} has digest {corpus.digest[:12]}, its card {card['digest'][:12]}: the file changed "
                "after the card was made; run `python -m pipelines corpus` again"
            )
        return replace(corpus, audio=audio) if card is not None and use_index else corpus

    @classmethod
    def _read(cls, path: Path) -> "Corpus":
        with _open_file(path) as file:
            if file.attrs["format_version"] != FORMAT_VERSION:
                raise RetortError(
                    f"{path} has corpus format {file.attrs['format_version']}, expected {FORMAT_VERSION}; make it again"
                )
            table = file["utterances"]
            labels = dict(table["labels"].items())
            (rows,) = table["id"].shape
            for name, column in [*((name, table[name]) for name in _COLUMNS), *labels.items()]:
                if column.shape != (rows,):
                    raise RetortError(
                        f"{path} is not a readable corpus: column {name} has shape {column.shape}, expected {rows} rows"
                    )

            def stored(column: h5py.Dataset) -> StoredColumn:
                return StoredColumn(path, column.name, rows, file.attrs["labels_digest"])

            return cls(
                path=path,
                name=file.attrs["name"],
                reader=file.attrs["reader"],
                digest=file.attrs["digest"],
                labels_digest=file.attrs["labels_digest"],
                ids=TextColumn.of(read_blocks(table["id"])),
                start=table["start"][:],
                num_samples=table["num_samples"][:],
                splits=CodedColumn.of(read_blocks(table["split"])),
                speakers=stored(table["speaker"]),
                labels={name: stored(column) for name, column in labels.items()},
                metadata=json.loads(file.attrs["metadata"]),
            )

    def __len__(self) -> int:
        return len(self.num_samples)

    def _check_table(self) -> None:
        """Raise RetortError for columns and samples that do not fit each other: the file may be from a stranger."""
        odd = re.search(rb"[\x00-\x1f\x7f]", self.ids.text[0].data)  # see `is_plain`
        if odd or not self.ids.is_filled() or self.ids.repeated() is not None:
            raise RetortError(f"{self.path} is not a readable corpus: its ids are not unique names")
        with _open_file(self.path) as file:
            # HDF5 links can point to any file on this machine: the audio must be in the corpus itself.
            if "samples" in file and file.get("samples", getlink=True).__class__ is not h5py.HardLink:
                raise RetortError(f"{self.path}: its samples lie in another file; give a corpus that holds them")
            samples = file.get("samples")
            if samples is None:
                return
            if not isinstance(samples, h5py.Dataset):
                raise RetortError(f"{self.path} is not a readable corpus: its `samples` are not a data set")
            if samples.external or samples.is_virtual:
                raise RetortError(f"{self.path}: its samples lie in another file; give a corpus that holds them")
            last = int((self.start + self.num_samples).max(initial=0))
            if samples.dtype != np.int16 or samples.ndim != 1 or last > len(samples) or self.start.min(initial=0) < 0:
                raise RetortError(
                    f"{self.path} is not a readable corpus: its table needs {last} int16 samples, found "
                    f"{samples.dtype} {samples.shape}; make it again with `python -m pipelines corpus`"
                )

    def __getstate__(self) -> dict[str, Any]:
        # h5py handles survive neither fork nor pickling: each process opens its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("_samples", "_place")}

    @cached_property
    def has_audio(self) -> bool:
        """True if the file holds the samples, False if it holds only the index."""
        with _open_file(self.path) as file:
            return "samples" in file

    def check_audio(self, need: str, instead: str = "") -> None:
        """Raise RetortError that names the file of the audio if there is only the index.

        need: what reads waveforms, with its verb. instead: another way, for the end of the line.
        """
        if not self.has_audio:
            raise RetortError(
                f"{need} waveforms, and {self.path} holds only the index of corpus {self.name}; copy its audio to "
                f"{self.audio or 'the .h5 file that its card names'}{instead}"
            )

    @cached_property
    def _samples(self) -> h5py.Dataset:
        self.check_audio("this command needs")
        return _open_file(self.path)["samples"]

    @cached_property
    def _place(self) -> tuple[int, int] | None:
        """File descriptor and byte of `/samples`; None where HDF5 does not keep them in one piece."""
        offset = self._samples.id.get_offset()
        return None if offset is None else (self._samples.file.id.get_vfd_handle(), offset)

    def samples(self, index: int, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
        """Read the samples of one utterance, int16 (num_samples,), into contiguous `out` if it is given."""
        start, count = int(self.start[index]), int(self.num_samples[index])
        out = np.empty(count, dtype=np.int16) if out is None else out
        assert out.shape == (count,) and out.dtype == np.int16
        with _described_errors(self.path):
            if self._place is None:
                self._samples.read_direct(out, np.s_[start : start + count])
            else:
                descriptor, offset = self._place
                # Half the time of HDF5's own read, and without its lock.
                if missing := read_at(descriptor, out.view(np.uint8).data, offset + 2 * start):
                    raise ValueError(f"it ends {missing} bytes too early")
        return out

    def waveform(self, index: int, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Read the waveform of one utterance, float32 (num_samples,) in [-1, 1), into `out` if it is given."""
        return scale_samples(self.samples(index), out)

    def cut_long(self, num_samples: int) -> "Corpus":
        """Return the corpus with utterances of more than `num_samples` in parts of at most so many; itself for 0.

        Parts of ID are ID#0001, ID#0002, …, of lengths that differ by at most CUT_GRID, end to end, in the place of the
        utterance. They begin on multiples of CUT_GRID, so that their frames are frames of the utterance's grid. Split
        and speaker are the utterance's; labels belong to whole utterances. The digest stays that of the whole corpus.
        Raises RetortError if an id of a part is the id of another utterance.
        """
        if not num_samples:
            return self
        assert not self.cut_samples and num_samples >= 4 * CUT_GRID  # no part is shorter than a grid step then
        limit = num_samples // CUT_GRID * CUT_GRID
        num_parts = np.where(self.num_samples > num_samples, -(-self.num_samples // limit), 1)
        utterance = np.repeat(np.arange(len(self), dtype=np.int64), num_parts)
        part = np.arange(len(utterance)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
        length, count = self.num_samples[utterance], num_parts[utterance]
        # Part p of n begins at p / n of the utterance, rounded up to the grid. Rounded up, no part exceeds `limit`.
        first, end = (
            np.minimum(-(-length * number // (count * CUT_GRID)) * CUT_GRID, length) for number in (part, part + 1)
        )
        ids = _part_ids(self.ids, utterance, np.where(count > 1, part + 1, 0))
        if (repeated := ids.repeated()) is not None:
            raise RetortError(
                f"corpus {self.name} ({self.path}): {repeated!r} is the id of an utterance and of a part of a cut one; "
                "rename the utterance"
            )
        return replace(
            self,
            ids=ids,
            start=self.start[utterance] + first,
            num_samples=end - first,
            splits=self.splits.take(utterance),
            speakers=TakenColumn(self.speakers, utterance),
            labels={name: TakenColumn(column, utterance) for name, column in self.labels.items()},
            cut_samples=num_samples,
            utterance=utterance,
        )

    @cached_property
    def is_part(self) -> NDArray[np.bool_]:
        """True for a row that is a part of an utterance, bool (rows,)."""
        if self.utterance is None:
            return np.zeros(len(self), dtype=bool)
        parts: NDArray[np.bool_] = np.bincount(self.utterance)[self.utterance] > 1
        return parts

    @property
    def num_cut(self) -> int:
        """Number of utterances that are in parts."""
        return 0 if self.utterance is None else len(np.unique(self.utterance[self.is_part]))

    def label(self, name: str) -> TextColumn:
        """Return one label column, in file order.

        Raises RetortError that lists the columns for an unknown name, and for a corpus with parts of utterances.
        """
        if self.is_part.any():
            raise RetortError(
                f"corpus {self.name} ({self.path}): {self.num_cut} utterances are in parts, which have no label "
                f"{name!r}; labels belong to whole utterances: extract without --cut-long"
            )
        if name not in self.labels:
            raise RetortError(
                f"corpus {self.name} ({self.path}) has no label {name!r}; "
                f"it has {', '.join(sorted(self.labels)) or 'none'}"
            )
        return self.labels[name]

    def select(self, split: str) -> NDArray[np.int64]:
        """Return the indices of a split's utterances, in file order. Raises RetortError that lists the splits."""
        chosen = self.splits.rows_of(split)
        if not len(chosen):
            raise RetortError(
                f"corpus {self.name} ({self.path}) has no split {split!r}; it has {', '.join(sorted(set(self.splits)))}"
            )
        return chosen


def index_of(path: Path) -> Path:
    """Return the path of the index beside a corpus or its card."""
    return path.with_suffix(".index.h5")


def read_blocks(column: h5py.Dataset) -> Iterator[list[bytes]]:
    """Yield the rows of a text column in blocks: Python objects of a whole column never exist at once."""
    for first in range(0, len(column), BLOCK_ROWS):
        yield column[first : first + BLOCK_ROWS].tolist()


def _part_ids(ids: TextColumn, utterance: NDArray[np.int64], number: NDArray[np.int64]) -> TextColumn:
    """Return the ids of rows, with the number of the part where it is not 0."""

    def block(first: int) -> list[bytes]:
        rows = slice(first, first + BLOCK_ROWS)
        pairs = zip(utterance[rows].tolist(), number[rows].tolist(), strict=True)
        return [(f"{ids[row]}#{part:04d}" if part else ids[row]).encode() for row, part in pairs]

    return TextColumn.of(map(block, range(0, len(utterance), BLOCK_ROWS)))


def scale_samples(samples: NDArray[np.int16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return samples as a waveform, float32 in [-1, 1), in `out` if it is given."""
    # A multiplication by a power of two is exact.
    return np.multiply(samples, np.float32(1 / 32_768), out=out, dtype=np.float32)


def waveform_statistics(waveform: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """Return the mean of a waveform and the deviation by which it is divided to be normalised."""
    return waveform.mean(), np.sqrt(waveform.var() + np.float32(1e-7))


def normalise_waveform(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 (num_samples,) with zero mean and unit variance, as Wav2Vec2FeatureExtractor of transformers."""
    mean, deviation = waveform_statistics(waveform)
    scaled: NDArray[np.float32] = (waveform - mean) / deviation
    return scaled


def _open_file(path: Path) -> h5py.File:
    """Open a corpus for reading. Raises OSError with the cause."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise RetortError(f"corpus {path} is a folder or a device; give the .h5 file, or its card")
    with path.open("rb"):  # raises the error of the system, which HDF5 would only describe
        pass
    # With HDF5's lock, or without one if none is available, as on NFS and Lustre. No lock is needed: a corpus is
    # written under a temporary name and never in place. The lock is tried first because HDF5 requires all handles of a
    # file in one process to be opened alike, and other code opens with a lock.
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "lock" not in str(error):
            raise
    return h5py.File(path, "r", locking=False)


@contextmanager
def _described_errors(path: Path) -> Iterator[None]:
    """Raise errors of HDF5 and of the system as one line about the corpus at `path`."""
    try:
        yield
    except RetortError:
        raise
    except (OSError, *_DAMAGE) as error:
        raise _trouble(path, error) from None


def _trouble(path: Path, error: Exception) -> RetortError:
    """Return the error line for a corpus that can't be opened or read: no access, or a damaged file."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return RetortError(
            f"corpus {path} does not exist, nor an index beside its card; make it with `python -m pipelines corpus` "
            "(or `dvc repro -f`)"
        )
    if "unable to lock file" in str(error):
        return RetortError(
            f"corpus {path} can't be locked: another program holds it, or its file system has no locks; set "
            "HDF5_USE_FILE_LOCKING=FALSE in the environment and run the command again"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return RetortError(
            f"corpus {path} can't be read: {os.strerror(error.errno)}; grant read access to it, or give a readable copy"
        )
    return RetortError(f"{path} is not a readable corpus ({error}); make it again with `python -m pipelines corpus`")
