"""Listed utterances, and the functions that all readers share to find files and to read lists and tables.

A reader lists a data set without opening its audio. Every file that a list names becomes an utterance, also where it is
missing: `read_corpus` reports all missing files at once. A folder of another layout is an error of the reader.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from extract.base.errors import RetortError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".sph")
# UTF-32 in little endian begins with the mark of UTF-16 and is reported as such.
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


@dataclass(frozen=True, kw_only=True)
class ListedUtterance:
    """One utterance as its data set lists it: a file or a part of it, and its labels.

    crop_s: (start, duration) of the part in seconds; None is the whole file.
    trim_silence: remove silence, after the gain.
    shortest_s: utterances that are then shorter are left out and counted.
    """

    file: Path
    id: str
    split: str
    speaker: str
    labels: dict[str, str] = field(default_factory=dict)
    crop_s: tuple[float, float] | None = None
    gain_db: float = 0.0
    trim_silence: bool = False
    shortest_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """Options of `python -m pipelines corpus`: `parts` and `lexicon` for librispeech, `rename` for folder."""

    parts: tuple[str, ...] = ()
    lexicon: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)


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
        return RetortError(f"{root}: {missing} not found; expected the layout of {self.name}: {self.tree}")

    def require(self, root: Path, *paths: Path) -> None:
        """Raise RetortError for the first path below `root` that does not exist."""
        for path in paths:
            if not path.exists():
                raise self.error(root, path.relative_to(root).as_posix())

    def require_any(self, root: Path, listed: Sequence[ListedUtterance], list_name: str) -> None:
        """Raise RetortError if a list names files and none of them exists: the audio is elsewhere."""
        if listed and not any(utterance.file.exists() for utterance in listed):
            file = listed[0].file
            name = file.relative_to(root) if file.is_relative_to(root) else file
            raise self.error(root, f"all files of {list_name}, such as {name.as_posix()},")


def line_error(path: Path, line: str, expected: str) -> RetortError:
    """Return the error for a line of a list that is not of the expected form."""
    return RetortError(f"{path}: got line {line!r}, expected {expected}")


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that match below a folder, sorted, without hidden files and folders (`._x.wav`, `.git/`)."""
    found = folder.glob(pattern)
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def visible_audio(folder: Path, pattern: str) -> list[Path]:
    """Return the matching audio files below a folder, by their suffix in upper or lower case."""
    return [path for path in visible(folder, pattern) if path.suffix.lower() in AUDIO_SUFFIXES]


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


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list that are not blank. Raises RetortError when it can't be read or is not UTF-8.

    Lines end with LF, CRLF or CR alone. Byte-order marks inside a list (of files that were joined) are removed.
    """
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in (line.removeprefix("\ufeff") for line in lines) if line.strip()]


def read_table(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header that has all `columns`. Blank rows are left out.

    Raises RetortError for a missing or repeated column, a line with more or fewer values than the header, another
    delimiter than a comma, and a table without rows.
    """
    columns = tuple(columns)
    rows: list[dict[str, str]] = []
    try:
        # A quoted value may hold line ends, so the text is not split into lines here.
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        header: list[str] | None = None
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            if header is None:
                header = _check_header(path, [name.strip() for name in row], columns)
            elif len(row) != len(header):
                raise RetortError(f"{path}: line {reader.line_num} has {len(row)} columns, expected {len(header)}")
            else:
                rows.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise RetortError(f"{path}: not a CSV file ({error}); save it again as CSV") from None
    if not rows:
        found = "is empty" if header is None else "has a header and no rows"
        named = f" with {', '.join(columns)}" if columns else ""
        raise RetortError(f"{path} {found}; expected a header{named}, and a row for each file")
    return rows


def _check_header(path: Path, header: list[str], columns: tuple[str, ...]) -> list[str]:
    if len(header) == 1 and (delimiter := next((sign for sign in ";\t|" if sign in header[0]), None)):
        raise RetortError(f"{path}: values are separated by {delimiter!r}, expected commas; save it again as CSV")
    if twice := [name for name in header if header.count(name) > 1]:
        raise RetortError(f"{path}: column {twice[0]!r} occurs twice, expected once; rename or remove one")
    if missing := [column for column in columns if column not in header]:
        raise RetortError(f"{path}: column {missing[0]!r} not found; expected {', '.join(columns)}")
    return header
