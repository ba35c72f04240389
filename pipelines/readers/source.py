"""One `Source` an utterance, and the functions by which all readers find files and read lists and tables.

A reader lists a data set without opening its audio. Every file that a list names becomes a source, also where it is
absent: `read_corpus` names all absent files at once. A folder of another layout is an error of the reader.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from extract.base.errors import RetortError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".sph")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One utterance as its data set holds it. `crop_s` is (start, duration) in seconds; None is the whole file.

    `trim_silence` cuts silence after the gain; what is then shorter than `shortest_s` is left out and counted.
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
    """What the command lets a user choose. `parts` and `lexicon` are LibriSpeech's, `rename` is the folder reader's."""

    parts: tuple[str, ...] = ()
    lexicon: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)


def layout_error(root: Path, what: str, missing: str, tree: str) -> RetortError:
    """The one line for a folder that is no such data set: what is missing, and the tree that was expected."""
    return RetortError(f"{root} is not laid out as {what}: {missing} is missing; expected {tree}")


def check_any_there(sources: Sequence[Source], root: Path, what: str, list_name: str, tree: str) -> None:
    """Raise the layout error if none of the files that a list names is there: the audio lies elsewhere."""
    if sources and not any(source.file.exists() for source in sources):
        file = sources[0].file
        name = file.relative_to(root) if file.is_relative_to(root) else file
        raise layout_error(root, what, f"every file of {list_name}, such as {name.as_posix()},", tree)


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that match below a folder, sorted, without hidden files and folders (`._x.wav`, `.git/`)."""
    found = folder.glob(pattern)
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def visible_audio(folder: Path, pattern: str) -> list[Path]:
    """Return the matching audio files below a folder, by their suffix in upper or lower case."""
    return [path for path in visible(folder, pattern) if path.suffix.lower() in AUDIO_SUFFIXES]


def audio_file(stem: Path, suffixes: Sequence[str], *, absent: str | None = None) -> Path:
    """Return the file of a name without a suffix: the first of the suffixes (or its upper case) that is there.

    Where none is, the name with the suffix `absent` (the first one by default), which is then reported as absent.
    """
    names = [stem.name + form for suffix in suffixes for form in (suffix, suffix.upper())]
    none_there = stem.with_name(stem.name + (absent or suffixes[0]))
    return next((path for name in names if (path := stem.with_name(name)).is_file()), none_there)


def listed_file(folder: Path, name: str) -> Path:
    """Return the file that a table names, relative to a folder; backslashes may separate its folders."""
    file = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not file.exists() else file


def read_text(path: Path) -> str:
    """Return a text file without its byte-order mark. Raises RetortError when it can't be read or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RetortError(f"{path} can't be read as text in UTF-8 ({error.strerror})") from None
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise RetortError(
                f"{path} can't be read as text in UTF-8: it begins with the byte-order mark of {encoding}; "
                "save it again as UTF-8"
            )
    if 4 * data.count(0) > len(data):
        raise RetortError(f"{path} can't be read as text in UTF-8: it looks like UTF-16; save it again as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RetortError(
            f"{path} can't be read as text in UTF-8: byte {data[error.start]:#04x} at {error.start:,} "
            "is of another encoding; save it again as UTF-8"
        ) from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a list that are not blank. Raises RetortError when it can't be read or is not UTF-8.

    Lines end with LF, CRLF or CR alone. Byte-order marks of lists that were joined are dropped too.
    """
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in (line.removeprefix("\ufeff") for line in lines) if line.strip()]


def read_table(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, which has all `columns`. Blank rows are left out.

    Raises RetortError for a column that is missing or there twice, for a line that has more or fewer than the header,
    for another delimiter than a comma, and for a table without rows.
    """
    columns = tuple(columns)
    rows: list[dict[str, str]] = []
    try:
        # A quoted value may hold line ends, so the text is not cut into lines here.
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
        raise RetortError(f"{path} is no CSV file ({error})") from None
    if header is None:
        raise RetortError(f"{path} is empty; expected a header{_with(columns)}, and a row for each file")
    if not rows:
        raise RetortError(f"{path} has a header and no rows; expected a row for each file")
    return rows


def _check_header(path: Path, header: list[str], columns: tuple[str, ...]) -> list[str]:
    if len(header) == 1 and (delimiter := next((sign for sign in ";\t|" if sign in header[0]), None)):
        raise RetortError(f"{path} has values separated by {delimiter!r}, expected commas; save it again as CSV")
    if twice := [name for name in header if header.count(name) > 1]:
        raise RetortError(f"{path} has the column {twice[0]!r} twice; expected each once")
    if missing := [column for column in columns if column not in header]:
        raise RetortError(f"{path} has no column {missing[0]!r}; expected {', '.join(columns)}")
    return header


def _with(columns: tuple[str, ...]) -> str:
    return f" with {', '.join(columns)}" if columns else ""
