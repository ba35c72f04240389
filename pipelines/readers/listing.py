"""Listed utterances, and the functions that all readers share to find files and to read lists and tables.

A reader lists a data set without opening its audio. Every file that a list names becomes an utterance, also where it is
missing: `read_corpus` reports all missing files at once. A folder of another layout is an error of the reader.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from extract.base.errors import RetortError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".sph")
_TRIED_NAMES = 100  # files of a list that decide which folder its paths are relative to
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z")
# UTF-32 in little endian begins with the mark of UTF-16 and is reported as such.
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


@dataclass(frozen=True, kw_only=True)
class ListedUtterance:
    """One utterance as its data set lists it: a file or a part of it, and its labels.

    data: reads the encoded file where it lies in a table, as in Parquet; `file` then names it in messages.
    crop_s: (start, duration) of the part in seconds; None is the whole file.
    expected_s: duration of the whole file as its table gives it; another one is refused.
    channel: the channel that is read, from 0; None averages all.
    trim_silence: remove silence, after the gain.
    shortest_s: utterances that are then shorter are left out and counted.
    """

    file: Path
    id: str
    split: str
    speaker: str
    labels: dict[str, str] = field(default_factory=dict)
    data: Callable[[], bytes] | None = None
    crop_s: tuple[float, float] | None = None
    expected_s: float | None = None
    channel: int | None = None
    gain_db: float = 0.0
    trim_silence: bool = False
    shortest_s: float = 0.0


@dataclass(frozen=True)
class Listing:
    """Utterances of a data set, and how its files were understood, for the user and the corpus card."""

    utterances: list[ListedUtterance]
    understood: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """Options of `python -m pipelines corpus`, of some readers each (pipelines/readers/__init__.py).

    dev_share, dev_by: None is the default, which depends on the data set (splits.py).
    """

    parts: tuple[str, ...] = ()
    lexicon: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)
    tables: tuple[Path, ...] = ()
    dev_share: float | None = None
    dev_by: Literal["speaker", "utterance"] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Layout:
    """The layout of a data set: its name, its tree in words, and its top folder, which a user may give or omit."""

    name: str
    tree: str
    top: str = ""

    def base(self, root: Path) -> Path:
        """Return the top folder below `root`, or `root` where the user gave the top folder itself."""
        return root / self.top if (root / self.top).is_dir() else root

    def error(self, root: Path, missing: str) -> RetortError:
        """Return the error for a folder that does not have this layout."""
        packed = named([path.name for path in archives(root, self.base(root))])
        fix = f"; found {packed}: unpack it" if packed else ""
        return RetortError(f"{root}: {missing} not found; expected the layout of {self.name}: {self.tree}{fix}")

    def require(self, root: Path, *paths: Path) -> None:
        """Raise RetortError for the first path below `root` that does not exist."""
        for path in paths:
            if not path.exists():
                raise self.error(root, path.relative_to(root).as_posix())

    def require_any(self, root: Path, listed: Sequence[ListedUtterance], list_name: str) -> None:
        """Raise RetortError if a list names files and none of them exists: the audio is elsewhere."""
        if listed and not any(utterance.file.exists() for utterance in listed):
            raise self.error(root, f"all files of {list_name}, such as {shown(listed[0].file, root)},")


def archives(*folders: Path) -> list[Path]:
    """Return the archives in some folders: a data set that is not (wholly) unpacked."""
    found = [path for folder in dict.fromkeys(folders) for path in visible(folder, "*")]
    # VoxCeleb1's archive is in parts, vox1_dev_wav_partaa to partad.
    return [path for path in found if path.name.lower().endswith(_ARCHIVES) or re.search("_part[a-z]{2}$", path.name)]


def line_error(path: Path, line: str, expected: str) -> RetortError:
    """Return the error for a line of a list that is not of the expected form."""
    return RetortError(f"{path}: got line {line!r}, expected {expected}")


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that match below a folder, sorted, without hidden files and folders (`._x.wav`, `.git/`)."""
    found = folder.glob(pattern)
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def visible_audio(folder: Path, pattern: str, *, also: Sequence[str] = ()) -> list[Path]:
    """Return the matching audio files below a folder, by their suffix in upper or lower case; `also`: more suffixes."""
    return [path for path in visible(folder, pattern) if path.suffix.lower() in (*AUDIO_SUFFIXES, *also)]


def audio_file(stem: Path, suffixes: Sequence[str], *, absent: str | None = None) -> Path:
    """Return the file of a name without a suffix: the first of the suffixes (or its upper case) that exists.

    Where none exists, the name with the suffix `absent` (the first one by default), which is then reported as missing.
    """
    names = [stem.name + form for suffix in suffixes for form in (suffix, suffix.upper())]
    missing = stem.with_name(stem.name + (absent or suffixes[0]))
    return next((path for name in names if (path := stem.with_name(name)).is_file()), missing)


def listed_file(folder: Path, name: str) -> Path:
    """Return the file that a table names, relative to a folder; backslashes may separate its folders."""
    file = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not file.exists() else file


def read_text(path: Path) -> str:
    """Return a text file without its byte-order mark. Raises RetortError when it can't be read or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RetortError(f"{path}: can't be read ({error.strerror}); expected a text file in UTF-8") from None
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise _not_utf8(path, f"it begins with the byte-order mark of {encoding}")
    if 4 * data.count(0) > len(data):  # half of the bytes of Latin text in UTF-16 are zero
        raise _not_utf8(path, "it looks like UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"byte {data[error.start]:#04x} at {error.start:,} is of another encoding") from None


def _not_utf8(path: Path, reason: str) -> RetortError:
    return RetortError(f"{path}: not text in UTF-8: {reason}; save it again as UTF-8")


def read_fields(path: Path, count: int, expected: str) -> Iterator[list[str]]:
    """Yield the fields of each line, which spaces separate. Raises RetortError for another number of them."""
    for line in read_lines(path):
        fields = line.split()
        if len(fields) != count:
            raise line_error(path, line, expected)
        yield fields


def read_seconds(text: str, where: object) -> float:
    """Return a time in seconds. Raises RetortError that begins with `where` for another text or a negative time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:  # also false for NaN
        raise RetortError(f"{where}: got time {text!r}, expected seconds of at least 0")
    return value


def part_of(start: str, end: str, where: object) -> tuple[float, float]:
    """Return (start, duration) in seconds of the part from `start` to `end`. Raises RetortError unless start < end."""
    first_s, last_s = read_seconds(start, where), read_seconds(end, where)
    if first_s >= last_s:
        raise RetortError(f"{where}: starts at {first_s:g} s and ends at {last_s:g} s, expected a later end")
    return first_s, last_s - first_s


def with_same_labels(utterances: list[ListedUtterance]) -> list[ListedUtterance]:
    """Return the utterances with the labels of all of them; those that one lacks are empty."""
    labels = dict.fromkeys(label for utterance in utterances for label in utterance.labels)
    return [replace(one, labels={label: one.labels.get(label, "") for label in labels}) for one in utterances]


def import_optional(name: str, requirement: str) -> Any:
    """Import a library of the extra `data`. Raises RetortError that names it where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RetortError(f"this reader needs {name} ({error}); install it: pip install '{requirement}'") from None


def base_of(names: Sequence[str], bases: Sequence[Path]) -> Path:
    """Return the first of the folders that has any of the named files; the first one where none has."""
    some = names[:_TRIED_NAMES]
    return next((base for base in bases if any(listed_file(base, name).is_file() for name in some)), bases[0])


def shown(path: Path, root: Path) -> str:
    """Return a path below `root` relative to it, any other as it is: the card shows it, on any machine alike."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def named(names: Sequence[object]) -> str:
    """Return some names and the number of the others, for an error line."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list that are not blank. Raises RetortError when it can't be read or is not UTF-8.

    Lines end with LF, CRLF or CR alone. Byte-order marks inside a list (of files that were joined) are removed.
    """
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in (line.removeprefix("\ufeff") for line in lines) if line.strip()]
