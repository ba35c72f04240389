"""Data sets -> corpus.h5: utterances with split, speaker and labels, then their decoded audio.

A reader, one file per data set or form of own data, lists its own on-disk layout without opening audio. `read_corpus`
decodes the listed files (rules: decode.py), reports all files that can't be used in one error, and writes the corpus.
Run: `python -m pipelines corpus READER ROOT --out C.h5`.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract import __version__
from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, find_input, in_main_tree
from extract.base.progress import ProgressBar
from extract.corpus import SAMPLE_RATE_HZ
from extract.corpus_writer import CorpusWriter, Utterance
from pipelines.readers.audio_file import Forward
from pipelines.readers.copied import copy_corpus
from pipelines.readers.decode import Bad, Decoded, NotInParallel, decode
from pipelines.readers.fluent import list_fluent
from pipelines.readers.folder import list_folder
from pipelines.readers.hugging_face import check_hub_or_folder, list_hf
from pipelines.readers.iemocap import list_iemocap
from pipelines.readers.kaldi import list_kaldi
from pipelines.readers.lhotse_manifests import check_manifests, list_lhotse
from pipelines.readers.librimix import list_librimix
from pipelines.readers.librispeech import list_librispeech
from pipelines.readers.listing import ListedUtterance, Listing, ReaderOptions, archives, named
from pipelines.readers.quesst14 import list_quesst14, read_scope, scope_without
from pipelines.readers.snips import list_snips
from pipelines.readers.speech_commands import list_speech_commands
from pipelines.readers.splits import describe_dev, own, published
from pipelines.readers.voxceleb1 import list_voxceleb1
from pipelines.readers.voxceleb1_trials import list_trials, read_trials, trials_without

__all__ = ["READERS", "ListedUtterance", "ReaderOptions", "read_corpus"]

_NAMED_AT_MOST = 50  # bad files that one error names
_GROUP = 64  # files that are decoded in parallel before the first of them is written
_LONGEST_IN_PARALLEL_S = 120.0  # longer ones are decoded one by one: 64 of 120 s are 250 MB at 16 kHz


def _require_folder(reader: str, root: Path) -> None:
    if not root.is_dir():
        raise RetortError(f"data set folder {root} not found; give the folder that holds the files of {reader}")


@dataclass(frozen=True)
class Reader:
    """Functions of one data set.

    list_data_set: the utterances below a root.
    options: those of the command that it takes.
    check_root: raises RetortError for a root that can't be one of this reader.
    metadata: the metadata of the corpus as a whole, where it has any.
    without: that metadata for a corpus without the dropped utterances.
    """

    list_data_set: Callable[[Path, ReaderOptions], Listing]
    options: tuple[str, ...] = ()
    check_root: Callable[[str, Path], None] = _require_folder
    metadata: Callable[[Path], dict[str, Any]] = lambda root: {}
    without: Callable[[dict[str, Any], Sequence[ListedUtterance]], dict[str, Any]] = lambda metadata, dropped: metadata


_DEV = ("--dev-share", "--dev-by", "--seed")

COPY = "copy"  # in place of a reader: the corpus of another pipeline, whose card is ROOT
READERS = {
    # own data
    "folder": Reader(own(list_folder), ("--rename", "--table", *_DEV)),
    "hf": Reader(own(list_hf), ("--rename", *_DEV), check_root=check_hub_or_folder),
    "kaldi": Reader(own(list_kaldi), _DEV),
    "lhotse": Reader(own(list_lhotse), _DEV, check_root=check_manifests),
    # published data sets
    "fluent": Reader(published(list_fluent)),
    "iemocap": Reader(published(list_iemocap)),
    "librispeech": Reader(published(list_librispeech), ("--part", "--lexicon")),
    "snips": Reader(published(list_snips)),
    "librimix": Reader(published(list_librimix)),
    "quesst14": Reader(published(list_quesst14), metadata=read_scope, without=scope_without),
    "speech-commands": Reader(published(list_speech_commands)),
    "voxceleb1": Reader(published(list_voxceleb1)),
    "voxceleb1-trials": Reader(published(list_trials), metadata=read_trials, without=trials_without),
}


@dataclass
class Findings:
    """Findings about the files of a corpus while they are decoded: files that were dropped, changed or noted."""

    bad: dict[str, None] = field(default_factory=dict)  # "FILE (REASON)" in order, each file once
    dropped: list[ListedUtterance] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    noted: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(
        self, utterance: ListedUtterance, *, bad: str = "", changes: Iterable[str] = (), notes: Iterable[str] = ()
    ) -> None:
        """Add those on one utterance. bad: the reason why it is dropped."""
        if bad:
            self.bad[f"{_printable(utterance.file)} ({bad})"] = None
            self.dropped.append(utterance)
        self.changed.update(changes)
        for note in notes:
            self.noted[note].append(_printable(utterance.file))

    def record(self) -> dict[str, Any]:
        """Return the part of the corpus's card that lists them."""
        noted = {
            note: {"files": len(files), "first": files[:_NAMED_AT_MOST]} for note, files in sorted(self.noted.items())
        }
        record = {"dropped": list(self.bad), "changed": dict(sorted(self.changed.items()))}
        return record | ({"noted": noted} if noted else {})

    def check(self, num_listed: int, root: Path, *, skip_bad: bool) -> None:
        """Raise RetortError for bad files unless `skip_bad`, and for a corpus that would be empty."""
        if not num_listed:
            raise RetortError("the corpus would be empty: the lists of the data set name no utterance")
        bad = list(self.bad)
        more = f" and {len(bad) - _NAMED_AT_MOST} more" if len(bad) > _NAMED_AT_MOST else ""
        found = f"{'; '.join(bad[:_NAMED_AT_MOST])}{more}"
        absent = any(name.endswith("(does not exist)") for name in bad)
        packed = [path.name for path in archives(root)] if absent and root.is_dir() else []
        fix = f"Unpack {named(packed)}" if packed else "Repair them"
        if bad and not skip_bad:
            raise RetortError(
                f"{len(bad)} of {num_listed} files can't be used: {found}. "
                f"{fix}, or drop and record them with --skip-bad"
            )
        if len(self.dropped) == num_listed:
            raise RetortError(f"the corpus would be empty: none of {num_listed} files can be used: {found}. {fix}")


def read_corpus(
    reader: str, root: Path, out: Path, *, options: ReaderOptions | None = None, skip_bad: bool = False
) -> dict[str, Any]:
    """Read a data set folder into the corpus `out` (an .h5 path) and return its card.

    Raises RetortError for an unknown reader, a folder of another layout, and, unless `skip_bad` (which drops and
    records them), for files that are missing, unreadable, truncated, empty, too short for one frame or hold NaN, all of
    them named. Files that are odd and kept (clipped, silent) are in the card's `record`, as `noted`.
    """
    if reader not in READERS and reader != COPY:
        raise unknown("reader", reader, READERS)
    if out.suffix != ".h5":
        raise RetortError(f"--out {out}: a corpus is an .h5 file, such as corpora/{out.stem}.h5")
    check_out(in_main_tree(out), "--out")
    check_out(out.with_suffix(".json"), "--out")
    root = find_input(root)  # a data set that git ignores is not in a temporary experiment
    options = options or ReaderOptions()
    _check_options(reader, options)
    if reader == COPY:
        return copy_corpus(root, out)
    READERS[reader].check_root(reader, root)
    listing = READERS[reader].list_data_set(root, options)
    listed = listing.utterances
    _check_ids(listed)
    metadata = READERS[reader].metadata(root)
    findings = Findings()
    with (
        CorpusWriter(out, name=out.stem, reader=reader, resumable=True) as writer,
        ProgressBar(f"corpus {out.stem}", total=len(listed), unit="files") as bar,
    ):
        for line in _describe(listing):
            bar.say(f"corpus {out.stem}: {line}")
        _decode_all(listed, writer, findings, bar)
        findings.check(len(listed), root, skip_bad=skip_bad)
        record = ({"listing": listing.understood} if listing.understood else {}) | findings.record()
        if findings.dropped:
            metadata |= READERS[reader].without(metadata, findings.dropped)
            record |= {key: metadata[key] for key in ("trials_left_out",) if key in metadata}
        return writer.finish(metadata, record)


def _check_options(reader: str, options: ReaderOptions) -> None:
    """Raise RetortError for an option of another reader."""
    for option, value in (
        ("--part", options.parts),
        ("--lexicon", options.lexicon),
        ("--rename", options.rename),
        ("--table", options.tables),
        ("--dev-share", options.dev_share is not None),
        ("--dev-by", options.dev_by),
        ("--seed", options.seed),
    ):
        if value and option not in READERS[reader].options:
            owners = [name for name, other in READERS.items() if option in other.options]
            raise RetortError(
                f"{option} is an option of the reader{'s' * (len(owners) > 1)} {', '.join(owners)}, not of {reader}; "
                "remove it"
            )


def _describe(listing: Listing) -> Iterator[str]:
    """Yield the lines on how own data was understood: tables, columns, splits, and a dev split that was drawn."""
    understood = listing.understood
    if not understood:
        return
    if "dev" in understood:
        yield describe_dev(understood["dev"])
    counts = Counter(utterance.split for utterance in listing.utterances)
    parts = sum(utterance.crop_s is not None for utterance in listing.utterances)
    renamed = {new: f"{new} (named {old})" for old, new in understood.get("splits", {}).items()}
    columns = [f"{old} as {new}" for old, new in understood.get("columns", {}).items()]
    yield "; ".join(
        [
            f"tables {named(understood['tables'])}" if understood["tables"] else "no table: all audio files",
            *([f"columns {', '.join(columns)}"] if columns else []),
            *([f"{parts} parts of longer files"] if parts else []),
            f"splits {', '.join(f'{renamed.get(split, split)} {count}' for split, count in sorted(counts.items()))}",
        ]
    )


def _check_ids(listed: list[ListedUtterance]) -> None:
    """Raise RetortError for an id of two utterances, with both files."""
    first_of: dict[str, ListedUtterance] = {}
    for utterance in listed:
        other = first_of.setdefault(utterance.id, utterance)
        if other is utterance:
            continue
        same = utterance.file == other.file and utterance.crop_s == other.crop_s
        files = f"{_place(utterance)} is listed twice" if same else f"{_place(other)} and {_place(utterance)}"
        raise RetortError(
            f"utterance id {utterance.id!r} occurs twice: {files}; remove one of them, or give each an id of its own "
            "(of a table: in a column `id`)"
        )


def _place(utterance: ListedUtterance) -> str:
    if utterance.crop_s is None:
        return str(utterance.file)
    start_s, duration_s = utterance.crop_s
    return f"{utterance.file} ({start_s:g} to {start_s + duration_s:g} s)"


def _decode_all(listed: list[ListedUtterance], writer: CorpusWriter, findings: Findings, bar: ProgressBar) -> None:
    """Decode the utterances in order and write them; continue after those that a killed process has written."""
    for utterance, found in zip(listed, writer.resume(map(_signature, listed)), strict=False):
        findings.add(utterance, **found)
    if writer.position:
        bar.skip(writer.position)
        bar.say(f"{bar.title}: continuing after the {writer.position} of {len(listed)} files that were read before")
    elif writer.discarded:
        bar.say(f"{bar.title}: starting anew: what was read before is of other files, or they have changed")
    with ThreadPoolExecutor() as pool, Forward() as forward:  # soundfile and torch release the interpreter lock
        for first in range(writer.position, len(listed), _GROUP):
            group = listed[first : first + _GROUP]
            signatures = list(map(_signature, group))  # before the files are read
            in_parallel = pool.map(_decode_short, group)
            for utterance, signature, short in zip(group, signatures, in_parallel, strict=True):
                decoded = short or decode(utterance, forward=forward)
                found, samples = _findings_on(utterance, decoded)
                findings.add(utterance, **found)
                writer.add(
                    None
                    if samples is None
                    else Utterance(utterance.id, samples, utterance.split, utterance.speaker, utterance.labels),
                    signature=signature,
                    found=found,
                )
            bar.advance(len(group))


def _findings_on(utterance: ListedUtterance, decoded: Decoded | Bad) -> tuple[dict[str, Any], NDArray[np.int16] | None]:
    """Return the arguments of `Findings.add`, and the samples unless the utterance is left out."""
    if isinstance(decoded, Bad):
        return {"bad": decoded.reason}, None
    found = {key: value for key, value in (("changes", decoded.changes), ("notes", decoded.notes)) if value}
    if len(decoded.samples) >= utterance.shortest_s * SAMPLE_RATE_HZ:
        return found, decoded.samples
    return found | {"changes": (*decoded.changes, f"left out, shorter than {utterance.shortest_s:g} s")}, None


def _signature(utterance: ListedUtterance) -> str:
    """Return a text that changes with the utterance as listed, the size or time of its file, and Retort's version."""
    try:
        status = utterance.file.stat()
        state = (status.st_size, status.st_mtime_ns)
    except OSError:
        state = (0, 0)
    return hashlib.sha256(repr((__version__, utterance, state)).encode(errors="backslashreplace")).hexdigest()[:16]


def _printable(path: Path) -> str:
    """Return a path as text for the card: bytes of a name that are not UTF-8 become escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def _decode_short(utterance: ListedUtterance) -> Decoded | Bad | None:
    """Decode an utterance, or return None for one that is decoded alone: memory then holds one long one at a time."""
    try:
        return decode(utterance, longest_s=_LONGEST_IN_PARALLEL_S)
    except NotInParallel:
        return None
