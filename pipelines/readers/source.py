"""What a reader gives: one `Source` an utterance, without opening its audio."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from extract.errors import RetortError


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


def read_lines(path: Path) -> list[str]:
    """The lines of a data set's text file. Raises RetortError when it can't be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RetortError(f"{path} can't be read as text in UTF-8 ({error})") from None


def read_table(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, which has all `columns`.

    Raises RetortError for a column that is missing, and for a line that has more or fewer than the header.
    """
    rows: list[dict[str, str]] = []
    try:
        reader = csv.reader(read_lines(path), strict=True)
        header = next(reader, [])
        if missing := [column for column in columns if column not in header]:
            raise RetortError(f"{path} has no column {missing[0]!r}; expected {', '.join(columns)}")
        for row in filter(None, reader):
            if len(row) != len(header):
                raise RetortError(f"{path}: line {reader.line_num} has {len(row)} columns, expected {len(header)}")
            rows.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise RetortError(f"{path} is no CSV file ({error})") from None
    return rows
