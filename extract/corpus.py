"""Corpus: one HDF5 file of utterances with labels, read by every stage.

    /samples                                int16 (samples,), 16 kHz mono, all utterances end to end
    /utterances/id, split, speaker          UTF-8 strings (utterances,)
    /utterances/start, num_samples          int64 (utterances,)
    /utterances/labels/NAME                 UTF-8 strings (utterances,): text, phones, keyword, …

Beside NAME.h5 lies its card NAME.json with digests and counts. DVC tracks the card, because the audio may be 110 GB.
`python -m pipelines corpus READER ROOT --out corpora/NAME.h5` makes both.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.base.files import in_main_tree, read_json, sha256_json, write_json, written_aside
from extract.base.validate import check_fields, check_name, is_plain

FORMAT_VERSION = 1
SAMPLE_RATE_HZ = 16_000
_COPY_SAMPLES = 1 << 24  # 32 MB at a time, from the spool into the file
_DAMAGE = (KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError)  # h5py, for a damaged file


@dataclass(frozen=True)
class Utterance:
    """One utterance to be written to a corpus: `samples` int16 (num_samples,), 16 kHz mono."""

    id: str
    samples: NDArray[np.int16]
    split: str
    speaker: str
    labels: dict[str, str] = field(default_factory=dict)


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
    ids: list[str]
    start: NDArray[np.int64]  # (utterances,), first sample in `/samples`
    num_samples: NDArray[np.int64]  # (utterances,)
    splits: list[str]
    speakers: list[str]
    labels: dict[str, list[str]]
    metadata: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Corpus":
        """Open NAME.h5, or the file that the card NAME.json names.

        Raises RetortError if the file is missing, is not a corpus, or is not the one that the card describes.
        """
        path = Path(path)
        expected = None
        if path.suffix == ".json":
            value = read_json(path)
            try:
                card = check_fields({"file": str, "digest": str}, value, where=str(path))
            except RetortError as error:
                raise RetortError(f"{error}; make the corpus with `python -m pipelines corpus`") from None
            path, expected = in_main_tree(card["file"]), card["digest"]
        try:
            corpus = cls._read(path)
            check_name(corpus.name, where=f"{path}: name")  # folders of stores begin with it
            corpus._check_table()
        except RetortError:
            raise
        except (OSError, *_DAMAGE) as error:
            raise _trouble(path, error) from None
        if expected is not None and corpus.digest != expected:
            raise RetortError(
                f"corpus {path} has digest {corpus.digest[:12]}, its card {expected[:12]}: the file changed after the "
                "card was made; run `python -m pipelines corpus` again"
            )
        return corpus

    @classmethod
    def _read(cls, path: Path) -> "Corpus":
        with _open_file(path) as file:
            if file.attrs["format_version"] != FORMAT_VERSION:
                raise RetortError(
                    f"{path} has corpus format {file.attrs['format_version']}, expected {FORMAT_VERSION}; make it again"
                )
            table = file["utterances"]

            def strings(column: h5py.Dataset) -> list[str]:
                return [value.decode() for value in column[:]]

            return cls(
                path=path,
                name=file.attrs["name"],
                reader=file.attrs["reader"],
                digest=file.attrs["digest"],
                labels_digest=file.attrs["labels_digest"],
                ids=strings(table["id"]),
                start=table["start"][:],
                num_samples=table["num_samples"][:],
                splits=strings(table["split"]),
                speakers=strings(table["speaker"]),
                labels={name: strings(column) for name, column in table["labels"].items()},
                metadata=json.loads(file.attrs["metadata"]),
            )

    def __len__(self) -> int:
        return len(self.ids)

    def _check_table(self) -> None:
        """Raise RetortError for columns and samples that do not fit each other: the file may be from a stranger."""
        columns: dict[str, Any] = {"start": self.start, "num_samples": self.num_samples, "split": self.splits}
        columns |= {"speaker": self.speakers} | self.labels
        if len(set(self.ids)) < len(self.ids) or not all(map(is_plain, self.ids)):
            raise RetortError(f"{self.path} is not a readable corpus: its ids are not unique names")
        if odd := [name for name, column in columns.items() if len(column) != len(self.ids)]:
            raise RetortError(
                f"{self.path} is not a readable corpus: column {odd[0]} has {len(columns[odd[0]])} rows, expected "
                f"{len(self.ids)}"
            )
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
        return {key: value for key, value in self.__dict__.items() if key != "_samples"}

    @cached_property
    def has_audio(self) -> bool:
        """True if the file holds the samples, False if it holds only the index."""
        with _open_file(self.path) as file:
            return "samples" in file

    @cached_property
    def _samples(self) -> h5py.Dataset:
        return _open_file(self.path)["samples"]

    def samples(self, index: int) -> NDArray[np.int16]:
        """Read the samples of one utterance, int16 (num_samples,)."""
        start = int(self.start[index])
        try:
            values: NDArray[np.int16] = self._samples[start : start + int(self.num_samples[index])]
        except RetortError:
            raise
        except (OSError, *_DAMAGE) as error:
            raise _trouble(self.path, error) from None
        return values

    def waveform(self, index: int, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Read the waveform of one utterance, float32 (num_samples,) in [-1, 1), into `out` if it is given."""
        # A multiplication by a power of two is exact.
        return np.multiply(self.samples(index), np.float32(1 / 32_768), out=out, dtype=np.float32)

    def label(self, name: str) -> list[str]:
        """Return one label column, in file order. Raises RetortError that lists the columns for an unknown name."""
        if name not in self.labels:
            raise RetortError(
                f"corpus {self.name} ({self.path}) has no label {name!r}; "
                f"it has {', '.join(sorted(self.labels)) or 'none'}"
            )
        return self.labels[name]

    def select(self, split: str) -> NDArray[np.int64]:
        """Return the indices of a split's utterances, in file order. Raises RetortError that lists the splits."""
        chosen = np.flatnonzero(np.array(self.splits) == split)
        if not len(chosen):
            raise RetortError(
                f"corpus {self.name} ({self.path}) has no split {split!r}; it has {', '.join(sorted(set(self.splits)))}"
            )
        return chosen


def normalise_waveform(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 (num_samples,) with zero mean and unit variance, as Wav2Vec2FeatureExtractor of transformers."""
    scaled: NDArray[np.float32] = (waveform - waveform.mean()) / np.sqrt(waveform.var() + np.float32(1e-7))
    return scaled


def _open_file(path: Path) -> h5py.File:
    """Open a corpus for reading. Raises OSError with the cause."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise RetortError(f"corpus {path} is a folder or a device; give the .h5 file, or its card")
    with path.open("rb"):  # raises the error of the system, which HDF5 would only describe
        pass
    return _open_without_lock(path, "r")


def _open_without_lock(path: Path, mode: str) -> h5py.File:
    """Open with HDF5's lock, or without a lock if none is available, as on NFS and Lustre.

    No lock is needed: a corpus is written under a temporary name and never in place. The lock is tried first because
    HDF5 requires all handles of a file in one process to be opened alike, and other code opens with a lock.
    """
    try:
        return h5py.File(path, mode)
    except OSError as error:
        if "lock" not in str(error):
            raise
    return h5py.File(path, mode, locking=False)


def _trouble(path: Path, error: Exception) -> RetortError:
    """Return the error line for a corpus that can't be opened or read: no access, or a damaged file."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return RetortError(
            f"corpus {path} does not exist; make it with `python -m pipelines corpus` (or `dvc repro -f`)"
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


def write_corpus(
    path: Path,
    *,
    name: str,
    reader: str,
    utterances: Iterable[Utterance],
    metadata: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write NAME.h5 and then its card NAME.json, both atomically; return the card.

    Audio is streamed: memory holds one utterance at a time. record: the reader's counts, such as resampled and dropped
    files, for the card. Raises RetortError for an empty corpus, a repeated id, or utterances with different labels.
    """
    path = Path(path)
    with written_aside(in_main_tree(path)) as aside:
        card = _write(aside, name=name, reader=reader, utterances=utterances, metadata=metadata or {})
    card |= {"file": path.as_posix(), "record": record or {}}
    write_json(path.with_suffix(".json"), card)
    return card


def _write(
    path: Path, *, name: str, reader: str, utterances: Iterable[Utterance], metadata: dict[str, Any]
) -> dict[str, Any]:
    rows: list[Utterance] = []
    lengths: list[int] = []
    digest = hashlib.sha256()
    # A contiguous data set needs its length first, which is known after decoding: samples pass through a spool file.
    with tempfile.TemporaryFile(dir=path.parent) as spool, _open_without_lock(path, "w") as file:
        for utterance in utterances:
            block = np.ascontiguousarray(utterance.samples, dtype="<i2")
            digest.update(f"{utterance.id}\0{len(block)}\0".encode(errors="replace"))  # `_check` refuses invalid ids
            digest.update(block.tobytes())
            spool.write(block.tobytes())
            lengths.append(len(block))
            rows.append(replace(utterance, samples=block[:0]))  # without its samples, which would fill the memory
        _check(rows)
        num_samples = sum(lengths)
        samples = file.create_dataset("samples", (num_samples,), dtype="<i2")
        spool.seek(0)
        for start in range(0, num_samples, _COPY_SAMPLES):
            block = np.frombuffer(spool.read(2 * _COPY_SAMPLES), dtype="<i2")
            samples[start : start + len(block)] = block
        columns = {label: [row.labels[label] for row in rows] for label in rows[0].labels}
        card = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "reader": reader,
            "digest": digest.hexdigest(),
            "labels_digest": sha256_json(
                [[row.split for row in rows], [row.speaker for row in rows], columns, metadata]
            ),
            "num_utterances": len(rows),
            "num_samples": num_samples,
            "hours": round(num_samples / SAMPLE_RATE_HZ / 3600, 4),
            "splits": dict(sorted(Counter(row.split for row in rows).items())),
            "num_speakers": len({row.speaker for row in rows}),
            "labels": sorted(columns),
        }
        _write_table(file, rows, np.array(lengths, dtype=np.int64), columns)
        file.attrs.update({key: card[key] for key in ("format_version", "name", "reader", "digest", "labels_digest")})
        file.attrs["sample_rate_hz"] = SAMPLE_RATE_HZ
        file.attrs["metadata"] = json.dumps(metadata, sort_keys=True)
    return card


def _check(rows: list[Utterance]) -> None:
    if not rows:
        raise RetortError("the corpus would be empty: the reader found no utterance")
    for label in rows[0].labels:
        check_name(label, where="a label's name")
    seen: set[str] = set()
    for row in rows:
        if not is_plain(row.id):
            raise RetortError(f"utterance id {row.id!r} is empty or holds control characters; give it another")
        for name, text in {"split": row.split, "speaker": row.speaker, **row.labels}.items():
            if text and not is_plain(text.replace("\n", " ").replace("\t", " ")):
                raise RetortError(
                    f"utterance {row.id!r}: its {name} {text!r} holds control characters or invalid UTF-8; remove them"
                )
        if row.id in seen:
            raise RetortError(f"utterance id {row.id!r} occurs twice; ids must be unique in a corpus")
        seen.add(row.id)
        if row.labels.keys() != rows[0].labels.keys():
            raise RetortError(
                f"utterance {row.id!r} has labels {sorted(row.labels)}, expected those of the first, "
                f"{sorted(rows[0].labels)}"
            )


def _write_table(
    file: h5py.File, rows: list[Utterance], lengths: NDArray[np.int64], columns: dict[str, list[str]]
) -> None:
    text = h5py.string_dtype("utf-8")
    table = file.create_group("utterances")
    table.create_dataset("id", data=[row.id for row in rows], dtype=text)
    table.create_dataset("split", data=[row.split for row in rows], dtype=text)
    table.create_dataset("speaker", data=[row.speaker for row in rows], dtype=text)
    table.create_dataset("start", data=np.cumsum(lengths) - lengths)
    table.create_dataset("num_samples", data=lengths)
    labels = table.create_group("labels")
    for label, values in columns.items():
        labels.create_dataset(label, data=values, dtype=text)
