"""Reader of own audio: a folder of files, with tables of them as other tools write them, or without a table.

Tables are metadata.csv, .tsv or .jsonl (one, or one in each folder of a split, as Hugging Face's audiofolder has them),
train.tsv, dev.tsv, … (Common Voice), or those that --table names (NeMo's manifests). docs/data.md shows each.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from extract.base.errors import RetortError
from extract.base.validate import is_plain
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    Listing,
    ReaderOptions,
    base_of,
    listed_file,
    named,
    part_of,
    read_seconds,
    shown,
    visible,
    visible_audio,
)
from pipelines.readers.splits import UNKNOWN_SPEAKER, kind_of
from pipelines.readers.tables import JSON_LINES, TABLES, read_table

AUDIO_COLUMNS = ("file", "file_name", "path", "audio_filepath", "audio")
# Column -> its other names, of which the first in a table counts where the column itself is not there
_ALIASES = {"speaker": ("client_id", "speaker_id"), "text": ("sentence", "transcription", "transcript")}
# Audio that libsndfile does not read: listed, so that it is reported and not left out without a word
_UNREADABLE = (".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr")
_LAYOUT = Layout("a folder", "audio files, and possibly metadata.csv (.tsv, .jsonl) with a column `file`")


@dataclass(frozen=True)
class Table:
    """One table: `base` is the folder that its paths are relative to, `split` that of its name or folder."""

    path: Path
    rows: list[dict[str, str]]
    base: Path
    split: str


def list_folder(root: Path, options: ReaderOptions) -> Listing:
    """List the files of the tables of a folder, or all audio files below it where it has no table.

    Of a table, one column of AUDIO_COLUMNS is required; `id`, `split`, `speaker`, and `start` and `end` in seconds (or
    `offset` and `duration`) are optional. Other columns become labels. `options.rename` maps a column to another name.
    """
    if not (paths := _find_tables(root, options.tables)):
        return _list_tree(root)
    tables: list[Table] = []
    columns: dict[str, str] = {}
    for path, split in paths.items():
        rows, used = _renamed(path, options.rename)
        names = [row["file"].strip() for row in rows]
        if odd := [name for name in names if not is_plain(name)]:
            raise RetortError(f"{path}: column `file` holds {odd[0]!r}, expected a path below {root}")
        own_folder = path.parent if path.is_relative_to(root) else root
        # Common Voice has its files in clips/; the paths of NeMo's manifests may be relative to the manifest.
        tables.append(Table(path, rows, base_of(names, [own_folder, own_folder / "clips", path.parent]), split))
        columns |= used
    labels = _labels(tables)
    # Tables may have different columns: the utterances of each get the labels of all.
    utterances = [_utterance(root, table, number, row, labels) for table in tables for number, row in _numbered(table)]
    understood = {"tables": [shown(path, root) for path in paths], "columns": columns}
    return Listing(in_file_order(utterances), understood)


def in_file_order(utterances: list[ListedUtterance]) -> list[ListedUtterance]:
    """Return the utterances with the parts of each file together, in order of their start, so that it is read once."""
    if all(utterance.crop_s is None for utterance in utterances):
        return utterances
    place: dict[Path, int] = {}
    for utterance in utterances:
        place.setdefault(utterance.file, len(place))
    return sorted(utterances, key=lambda one: (place[one.file], one.crop_s or (0.0, 0.0)))


def part_id(name: str, crop_s: tuple[float, float] | None) -> str:
    """Return the id of a file, or of a part of it with its start and end in milliseconds."""
    if crop_s is None:
        return name
    start_s, duration_s = crop_s
    return f"{name}-{round(1000 * start_s):07d}-{round(1000 * (start_s + duration_s)):07d}"


def _find_tables(root: Path, given: Sequence[Path]) -> dict[Path, str]:
    """Return the tables of a folder, or the given ones, each with the split of its name or folder ("" for none)."""
    if given:
        if missing := [path for path in given if not path.is_file()]:
            raise RetortError(f"--table {missing[0]}: file not found; give a table ({', '.join(TABLES)})")
        if odd := [path for path in given if path.suffix.lower() not in TABLES]:
            raise RetortError(f"--table {odd[0]}: unknown form of table, expected {', '.join(TABLES)}; rename it")
        return {path: split_in(path.stem) for path in given}
    top = [path for path in visible(root, "metadata.*") if path.suffix.lower() in TABLES]
    if len(top) > 1:
        raise RetortError(f"{root}: has {named([path.name for path in top])}; choose one with --table")
    if top:
        return {top[0]: ""}
    # As Hugging Face's audiofolder has them; then as Common Voice does.
    below = [path for path in visible(root, "*/metadata.*") if path.suffix.lower() in TABLES]
    beside = [path for path in visible(root, "*") if path.suffix.lower() in TABLES and kind_of(path.stem)]
    # `train.tsv` or `train_manifest.json`, but no other file whose name begins with the name of a split
    beside = [path for path in beside if re.fullmatch("[a-z]+([_-]manifest)?", path.stem.lower())]
    if below:
        return {path: split_in(path.parent.name) for path in below}
    return {path: split_in(path.stem) for path in beside}


def split_in(name: str) -> str:
    """Return the first part of the name of a table or folder that names a split, such as train of cv_train_manifest."""
    return next((part for part in re.split("[^A-Za-z]+", name) if kind_of(part)), "")


def _list_tree(root: Path) -> Listing:
    """List every audio file below a folder; its top folders are splits if all of them have the names of splits."""
    files = visible_audio(root, "**/*", also=_UNREADABLE)
    if not files:
        raise _LAYOUT.error(root, "an audio file or a table")
    names = [file.relative_to(root) for file in files]
    # All or none: a folder `test` among folders of speakers is not a split.
    in_splits = all(len(name.parts) > 1 and kind_of(name.parts[0]) for name in names)
    utterances = [
        ListedUtterance(
            file=file,
            id=name.with_suffix("").as_posix(),
            split=name.parts[0] if in_splits else "train",
            speaker=UNKNOWN_SPEAKER,
        )
        for file, name in zip(files, names, strict=True)
    ]
    return Listing(utterances, {"tables": [], "columns": {}})


def renamed_columns(where: Path, columns: Sequence[str], rename: dict[str, str]) -> dict[str, str]:
    """Return column -> its name here: that of `rename`, or `speaker` and `text` for their other usual names.

    Raises RetortError for a name that can't be used.
    """
    if missing := [old for old in rename if old not in columns]:
        raise RetortError(f"--rename {missing[0]}: column not found in {where}; it has {', '.join(columns)}")
    names = [rename.get(column, column) for column in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RetortError(f"{where}: column {twice[0]!r} exists already; give --rename another name")
    usual = {}
    for name, aliases in _ALIASES.items():
        if name not in names and (other := next((alias for alias in aliases if alias in names), None)):
            usual[other] = name
    return {column: usual.get(name, name) for column, name in zip(columns, names, strict=True)}


def _renamed(table: Path, rename: dict[str, str]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Return the rows of a table with its columns renamed, and the columns that were: old name -> new name.

    Raises RetortError unless exactly one column names the audio.
    """
    rows = read_table(table)
    columns = list(rows[0])
    if "" in columns:
        raise RetortError(f"{table}: column {columns.index('') + 1} has no name; name it, or remove it")
    names = renamed_columns(table, columns, rename)
    audio = [column for column, name in names.items() if name in AUDIO_COLUMNS]
    if not audio:
        raise RetortError(
            f"{table}: column `file` not found; it has {', '.join(columns)}; name the one with paths, such as "
            f"--rename {columns[0]}=file"
        )
    if len(audio) > 1:
        raise RetortError(
            f"{table}: columns {' and '.join(audio)} may all be paths of the audio, expected one; rename the others, "
            f"such as --rename {audio[1]}=other_{audio[1]}"
        )
    names[audio[0]] = "file"
    changed = {old: new for old, new in names.items() if old != new}
    return [dict(zip(names.values(), row.values(), strict=True)) for row in rows], changed


def _labels(tables: list[Table]) -> tuple[str, ...]:
    """Return the columns of all tables that are labels: neither of the file's own, nor the times of its part."""
    columns = dict.fromkeys(column for table in tables for column in table.rows[0])
    # A duration without an offset is a fact of the whole file, and a label as any other column.
    times = {"start", "end", "offset"} | ({"duration"} if "offset" in columns else set())
    return tuple(column for column in columns if column not in {"file", "id", "split"} | times)


def _numbered(table: Table) -> Iterator[tuple[int, dict[str, str]]]:
    return enumerate(table.rows, 1 if table.path.suffix.lower() in JSON_LINES else 2)  # the header is the first row


def _utterance(root: Path, table: Table, number: int, row: dict[str, str], labels: tuple[str, ...]) -> ListedUtterance:
    known = {key: row.get(key, "").strip() for key in ("file", "id", "split", "speaker")}
    file = listed_file(table.base, known["file"])
    # Ids are relative to ROOT, so that they are the same on every machine.
    name = file.relative_to(root) if file.is_relative_to(root) else file
    crop_s, expected_s = _times(row, f"{table.path}: row {number} ({known['file']})")
    return ListedUtterance(
        file=file,
        id=row["id"] if known["id"] else part_id(name.with_suffix("").as_posix(), crop_s),
        split=known["split"] or table.split or "train",
        speaker=known["speaker"] or UNKNOWN_SPEAKER,
        labels={key: known.get(key, row.get(key, "")) for key in labels},
        crop_s=crop_s,
        expected_s=expected_s,
    )


def _times(row: dict[str, str], where: str) -> tuple[tuple[float, float] | None, float | None]:
    """Return the part of a row as (start, duration), and the duration of a whole file where the row has it."""
    given = {name: text for name in ("start", "end", "offset", "duration") if (text := row.get(name, "").strip())}
    if "start" in given and "offset" in given:
        raise RetortError(f"{where}: has `start` and `offset`, expected one of them; rename a column with --rename")
    for one, other in (("start", "end"), ("end", "start"), ("offset", "duration")):
        if one in given and other not in given:
            raise RetortError(f"{where}: `{one}` without `{other}`, expected both, or none of them for the whole file")
    if "start" in given:
        return part_of(given["start"], given["end"], where), None
    if "duration" not in given:
        return None, None
    length_s = read_seconds(given["duration"], f"{where}: `duration`")
    if not length_s:
        raise RetortError(f"{where}: `duration` is 0 s, expected more; correct or remove the row")
    # NeMo's duration without an offset is that of the whole file.
    return ((read_seconds(given["offset"], where), length_s), None) if "offset" in given else (None, length_s)
