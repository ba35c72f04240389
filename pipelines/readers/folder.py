"""Reader of any folder of audio files with a table of them, metadata.csv."""

from pathlib import Path

from extract.base.errors import RetortError
from extract.base.validate import is_plain
from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, listed_file, read_table

_LAYOUT = Layout("a folder", "metadata.csv with a column `file`, and the files it names")


def list_folder(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List the files of metadata.csv: column `file` is required, `id`, `split` and `speaker` are optional.

    Other columns become labels. `options.rename` maps a column to another name, such as digit to keyword.
    """
    table = root / "metadata.csv"
    _LAYOUT.require(root, table)
    rows = _renamed(table, options.rename)
    if odd := [row["file"] for row in rows if not is_plain(row["file"].strip())]:
        raise RetortError(f"{table}: column `file` holds {odd[0]!r}, expected a path below {root}")
    listed = []
    for row in rows:
        known = {key: row.get(key, "").strip() for key in ("file", "id", "split", "speaker")}
        file = listed_file(root, known["file"])
        name = file.relative_to(root) if file.is_relative_to(root) else file
        listed.append(
            ListedUtterance(
                file=file,
                id=row["id"] if known["id"] else name.with_suffix("").as_posix(),
                split=known["split"] or "train",
                speaker=known["speaker"] or "unknown",
                labels={key: known.get(key, value) for key, value in row.items() if key not in ("file", "id", "split")},
            )
        )
    return listed


def _renamed(table: Path, rename: dict[str, str]) -> list[dict[str, str]]:
    """Return the rows of a table with its columns renamed. Raises RetortError for a name that can't be used."""
    rows = read_table(table)
    columns = list(rows[0])
    if missing := [old for old in rename if old not in columns]:
        raise RetortError(f"--rename {missing[0]}: column not found in {table}; it has {', '.join(columns)}")
    if "" in columns:
        raise RetortError(f"{table}: column {columns.index('') + 1} has no name; name it, or remove it")
    names = [rename.get(column, column) for column in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RetortError(f"{table}: column {twice[0]!r} exists already; give --rename another name")
    if "file" not in names:
        raise RetortError(f"{table}: column `file` not found; it has {', '.join(names)}; rename one with --rename")
    return [dict(zip(names, row.values(), strict=True)) for row in rows]
