"""Any tree of audio with a table of it."""

from pathlib import Path

from extract.checks import is_plain
from extract.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, layout_error, read_table


def read_folder(root: Path, options: ReaderOptions) -> list[Source]:
    """Any tree of audio with a metadata.csv: column `file` is required, `id`, `split` and `speaker` are known, others
    become labels. `rename` maps a column to another name, such as digit to keyword."""
    table = root / "metadata.csv"
    if not table.is_file():
        raise layout_error(
            root, "a folder", "metadata.csv", "metadata.csv with a column `file`, and the files it names"
        )
    rows = [{options.rename.get(key, key): value for key, value in row.items()} for row in read_table(table)]
    columns = rows[0].keys() if rows else set()
    if "file" not in columns:
        raise RetortError(f"{table} has columns {', '.join(columns) or '(none)'}; expected one named `file`")
    if odd := [row["file"] for row in rows if not is_plain(row["file"].strip())]:
        raise RetortError(f"{table}: column `file` holds {odd[0]!r}, expected a path below {root}")
    if missing := [old for old, new in options.rename.items() if new not in columns]:
        raise RetortError(f"--rename {missing[0]}: {table} has no such column; it has {', '.join(columns)}")
    return [
        Source(
            file=root / row["file"],
            id=row.get("id") or Path(row["file"]).with_suffix("").as_posix(),
            split=row.get("split") or "train",
            speaker=row.get("speaker") or "unknown",
            labels={key: value for key, value in row.items() if key not in ("file", "id", "split")},
        )
        for row in rows
    ]
