"""Tables of audio files: CSV, tab-separated values and JSON lines, as rows of text.

Readers take every value as text, since labels are text. The suffix of a table decides its form.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from extract.base.errors import RetortError
from pipelines.readers.listing import read_text

JSON_LINES = (".jsonl", ".json")  # NeMo names its manifests .json
TABLES = (".csv", ".tsv", *JSON_LINES)


def read_table(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a table that has all `columns`. Blank rows are left out.

    Raises RetortError for a missing or repeated column, a row of another length than the header, another delimiter, a
    line that is not JSON, and a table without rows.
    """
    columns = tuple(columns)
    if path.suffix.lower() in JSON_LINES:
        rows = _json_rows(path)
        header = list(rows[0]) if rows else None
    else:
        header, rows = _delimited_rows(path)
    if header is not None and (missing := [column for column in columns if column not in header]):
        raise RetortError(f"{path}: column {missing[0]!r} not found; expected {', '.join(columns)}")
    if not rows:
        found = "is empty" if header is None else "has a header and no rows"
        with_columns = f" with {', '.join(columns)}" if columns else ""
        raise RetortError(f"{path} {found}; expected a header{with_columns}, and a row for each file")
    return rows


def _delimited_rows(path: Path) -> tuple[list[str] | None, list[dict[str, str]]]:
    header: list[str] | None = None
    rows: list[dict[str, str]] = []
    for number, values in _delimited(path):
        if not any(map(str.strip, values)):
            continue
        if header is None:
            header = _check_header(path, [name.strip() for name in values])
        elif len(values) != len(header):
            raise RetortError(f"{path}: line {number} has {len(values)} columns, expected {len(header)}")
        else:
            rows.append(dict(zip(header, values, strict=True)))
    return header, rows


def _delimited(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each row."""
    if path.suffix.lower() == ".tsv":
        # Quotes are part of the values: Common Voice has sentences that begin with one.
        yield from ((number, line.split("\t")) for number, line in _numbered_lines(path))
        return
    try:
        # A quoted value may hold line ends, so the text is not split into lines here.
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise RetortError(f"{path}: not a CSV file ({error}); save it again as CSV") from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not str.splitlines, which also splits at characters that a sentence may hold, such as U+2028.
    return enumerate(read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)


def _check_header(path: Path, header: list[str]) -> list[str]:
    if len(header) == 1 and (delimiter := next((sign for sign in ";\t|," if sign in header[0]), None)):
        form = "tabs" if path.suffix.lower() == ".tsv" else "commas"
        raise RetortError(f"{path}: values are separated by {delimiter!r}, expected {form}; save it again as such")
    if twice := [name for name in header if header.count(name) > 1]:
        raise RetortError(f"{path}: column {twice[0]!r} occurs twice, expected once; rename or remove one")
    return header


def _json_rows(path: Path) -> list[dict[str, str]]:
    """Read one JSON object a line. A key that a line lacks is an empty value, as an empty cell of a CSV file is."""
    rows: list[dict[str, str]] = []
    columns: dict[str, None] = {}  # in the order in which they first occur
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RetortError(f"{path}: line {number} is not JSON ({error}); expected one object a line") from None
        if not isinstance(value, dict):
            raise RetortError(f"{path}: line {number} is a JSON {type(value).__name__}, expected an object")
        rows.append({name: as_text(item) for name, item in value.items()})
        columns.update(dict.fromkeys(value))
    return [{name: row.get(name, "") for name in columns} for row in rows]


def as_text(value: object) -> str:
    """Return a value of JSON as text: text as it is, nothing for null, everything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
