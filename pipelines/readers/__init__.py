"""Published data set folders -> corpus.h5: which files, which split, speaker and labels; then decoding.

A reader, one file a data set, lists that data set's own on-disk layout without opening audio. `read_corpus` decodes
what it lists (`decode` has the rules), names every file that can't be used in one error, and writes the corpus.
Run: `python -m pipelines corpus READER ROOT --out C.h5`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, in_main_tree
from extract.base.progress import ProgressBar
from extract.corpus import SAMPLE_RATE_HZ, Utterance, write_corpus
from pipelines.readers.decode import Bad, Decoded, TooLong, decode
from pipelines.readers.fluent import read_fluent
from pipelines.readers.folder import read_folder
from pipelines.readers.iemocap import read_iemocap
from pipelines.readers.librimix import read_librimix
from pipelines.readers.librispeech import read_librispeech
from pipelines.readers.quesst14 import read_quesst14, read_scope, scope_without
from pipelines.readers.snips import read_snips
from pipelines.readers.source import ReaderOptions, Source
from pipelines.readers.speech_commands import read_speech_commands
from pipelines.readers.voxceleb1 import read_trials, read_voxceleb1, read_voxceleb1_trials, trials_without

__all__ = ["READERS", "ReaderOptions", "Source", "read_corpus"]

_NAMED_AT_MOST = 50  # bad files that one error names
_AHEAD = 64  # files decoded before the first of them is written
_LONGEST_AHEAD_S = 120.0  # longer ones are decoded one by one: 64 of 120 s are 250 MB at 16 kHz

READERS: dict[str, Callable[[Path, ReaderOptions], list[Source]]] = {
    "fluent": read_fluent,
    "folder": read_folder,
    "iemocap": read_iemocap,
    "librispeech": read_librispeech,
    "snips": read_snips,
    "librimix": read_librimix,
    "quesst14": read_quesst14,
    "speech-commands": read_speech_commands,
    "voxceleb1": read_voxceleb1,
    "voxceleb1-trials": read_voxceleb1_trials,
}

# What belongs to a corpus as a whole, of the readers that know such a thing.
METADATA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "quesst14": read_scope,
    "voxceleb1-trials": read_trials,
}

# The metadata of a corpus without the utterances that were dropped.
WITHOUT: dict[str, Callable[[dict[str, Any], Sequence[Source]], dict[str, Any]]] = {
    "quesst14": scope_without,
    "voxceleb1-trials": trials_without,
}


def read_corpus(
    reader: str, root: Path, out: Path, *, options: ReaderOptions | None = None, skip_bad: bool = False
) -> dict[str, Any]:
    """Read a data set folder into the corpus `out` (an .h5 path) and return its card.

    Raises RetortError for an unknown reader, a folder of another layout, and, unless `skip_bad` (which drops and
    records them), for files that are absent, can't be read, are truncated, empty, too short for one frame or hold NaN,
    all named. What is odd and kept (clipping, silence) is in the card's `record`, as `noted`.
    """
    if reader not in READERS:
        raise unknown("reader", reader, READERS)
    if out.suffix != ".h5":
        raise RetortError(f"--out {out}: a corpus is an .h5 file, such as corpora/{out.stem}.h5")
    check_out(in_main_tree(out), "--out")
    check_out(out.with_suffix(".json"), "--out")
    if not root.is_dir():
        raise RetortError(f"data set folder {root} does not exist; give the folder that holds the {reader} tree")
    options = options or ReaderOptions()
    for option, given, takes in (
        ("--part", options.parts, "librispeech"),
        ("--lexicon", options.lexicon, "librispeech"),
        ("--rename", options.rename, "folder"),
    ):
        if given and reader != takes:
            raise RetortError(f"{option} is for the reader `{takes}`; `{reader}` takes none")
    sources = READERS[reader](root, options)
    _check_ids(sources, reader)
    metadata = METADATA[reader](root) if reader in METADATA else {}
    record: dict[str, Any] = {}
    with ProgressBar(f"corpus {out.stem}", total=len(sources), unit="files") as bar:
        utterances = _decode_all(sources, reader, metadata, record, skip_bad=skip_bad, bar=bar)
        return write_corpus(out, name=out.stem, reader=reader, utterances=utterances, metadata=metadata, record=record)


def _check_ids(sources: list[Source], reader: str) -> None:
    """Raise RetortError for an id that two sources share, with both files."""
    source_of: dict[str, Source] = {}
    for source in sources:
        other = source_of.setdefault(source.id, source)
        if other is source:
            continue
        way = "give every row its own id in a column `id`" if reader == "folder" else "remove one of them"
        files = f"{other.file} and {source.file}" if source.file != other.file else f"{source.file} is listed twice"
        raise RetortError(f"utterance id {source.id!r} occurs twice: {files}; {way}")


def _decode_all(
    sources: list[Source],
    reader: str,
    metadata: dict[str, Any],
    record: dict[str, Any],
    *,
    skip_bad: bool,
    bar: ProgressBar,
) -> Iterator[Utterance]:
    """Yield what can be decoded, in order; at the end, fill `record`, and adapt `metadata` to what was dropped."""
    bad: dict[str, None] = {}  # in order, each file once
    dropped: list[Source] = []
    changed: Counter[str] = Counter()
    noted: dict[str, list[str]] = {}
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(sources), _AHEAD):
            group = sources[first : first + _AHEAD]
            for source, ahead in zip(group, pool.map(_decode_ahead, group), strict=True):
                decoded = ahead or decode(source)
                if isinstance(decoded, Bad):
                    bad[f"{_printable(source.file)} ({decoded.reason})"] = None
                    dropped.append(source)
                    continue
                changed.update(decoded.changes)
                for note in decoded.notes:
                    noted.setdefault(note, []).append(_printable(source.file))
                if len(decoded.samples) < source.shortest_s * SAMPLE_RATE_HZ:
                    changed[f"left out, shorter than {source.shortest_s:g} s"] += 1
                    continue
                yield Utterance(source.id, decoded.samples, source.split, source.speaker, source.labels)
            bar.advance(len(group))
    _check_bad(list(bad), len(sources), all_bad=len(dropped) == len(sources), skip_bad=skip_bad)
    record |= {"dropped": list(bad), "changed": dict(sorted(changed.items()))}
    if noted:
        record["noted"] = {
            note: {"files": len(files), "first": files[:_NAMED_AT_MOST]} for note, files in sorted(noted.items())
        }
    if dropped and reader in WITHOUT:
        metadata |= WITHOUT[reader](metadata, dropped)
        record |= {key: metadata[key] for key in ("trials_left_out",) if key in metadata}


def _printable(path: Path) -> str:
    """Return a path as text that the card can hold: bytes of a name that are not UTF-8 as escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def _decode_ahead(source: Source) -> Decoded | Bad | None:
    """Decode a source beside others, or None for a long one: memory then holds one of those at a time."""
    try:
        return decode(source, longest_s=_LONGEST_AHEAD_S)
    except TooLong:
        return None


def _check_bad(bad: list[str], num_sources: int, *, all_bad: bool, skip_bad: bool) -> None:
    if not num_sources:
        raise RetortError("the corpus would be empty: the lists of the data set name no utterance")
    more = f" and {len(bad) - _NAMED_AT_MOST} more" if len(bad) > _NAMED_AT_MOST else ""
    named = f"{'; '.join(bad[:_NAMED_AT_MOST])}{more}"
    if bad and not skip_bad:
        raise RetortError(
            f"{len(bad)} of {num_sources} files can't be used: {named}. "
            "Mend them, or drop and record them with --skip-bad"
        )
    if all_bad:
        raise RetortError(f"the corpus would be empty: none of {num_sources} files can be used: {named}. Mend them")
