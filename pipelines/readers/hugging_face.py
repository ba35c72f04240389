"""Reader of data sets of Hugging Face's `datasets` (extra `data`): a folder, or an id of the hub.

`datasets` keeps the encoded audio as bytes in its tables. They are read one row at a time, when the row is decoded, by
the decoder of all readers: `datasets` would need torchcodec.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.folder import list_folder, renamed_columns
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    Listing,
    ReaderOptions,
    import_optional,
    visible,
    visible_audio,
    with_same_labels,
)
from pipelines.readers.splits import UNKNOWN_SPEAKER
from pipelines.readers.tables import as_text

_LAYOUT = Layout("datasets", "a folder of save_to_disk, of Parquet or Arrow files, or of audio files (an audiofolder)")
_ROWS = 64  # read at a time for their paths; audio is not decoded
_SAVED = ("dataset_dict.json", "state.json")  # of save_to_disk
_TABLES = (".parquet", ".arrow")
_SCALAR = re.compile("(large_)?string|u?int|float|bool")


@dataclass(frozen=True)
class Cell:
    """The encoded audio of one row; calling it reads the bytes. Its text changes with the data set."""

    dataset: Any = field(repr=False)  # of one column
    fingerprint: str
    row: int

    def __call__(self) -> bytes:
        (cell,) = self.dataset[self.row].values()
        return bytes(cell["bytes"])


def check_hub_or_folder(reader: str, root: Path) -> None:
    """Raise RetortError for a file: the root is a folder, or an id of the hub, which only the hub can check."""
    if root.is_file():
        raise RetortError(f"{root} is a file; give the folder of a data set, or an id of the hub such as org/name")


def list_hf(root: Path, options: ReaderOptions) -> Listing:
    """List the rows of a data set: save_to_disk, Parquet or Arrow files, a folder of audio, or `org/name[:config]`.

    One column has the type Audio. `id` and `speaker` are used under these and other usual names, and columns of text
    and numbers become labels. `options.rename` maps a column to another name.
    """
    if root.is_dir() and not _has_tables(root):
        if visible_audio(root, "**/*"):
            return list_folder(root, options)  # an audiofolder: files and metadata.csv
        raise _LAYOUT.error(root, "a data set or an audio file")
    datasets = import_optional("datasets", "datasets>=4.4")
    splits = _load(datasets, root)
    utterances: list[ListedUtterance] = []
    columns: dict[str, str] = {}
    for split, dataset in splits.items():
        columns |= (used := _columns(datasets, dataset, root, options.rename))
        utterances += _list_split(datasets, dataset, str(split), root, used)
    changed = {old: new for old, new in columns.items() if old != new}
    return Listing(with_same_labels(utterances), {"tables": [root.name], "columns": changed})


def _has_tables(root: Path) -> bool:
    saved = any((root / name).exists() for name in _SAVED)
    return saved or any(path.suffix in _TABLES for path in visible(root, "**/*"))


def _load(datasets: Any, root: Path) -> dict[str, Any]:
    """Return split -> data set. Raises RetortError where `datasets` does not load it."""
    datasets.disable_progress_bars()
    name, _, config = str(root).partition(":")
    failures = (OSError, ValueError, KeyError, ImportError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        if root.is_dir() and any((root / saved).exists() for saved in _SAVED):
            found = datasets.load_from_disk(str(root))
        else:
            found = datasets.load_dataset(name, config or None)
    except failures as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        kind = "a folder" if root.is_dir() else "not a folder here, so the hub was asked"
        raise RetortError(
            f"{root}: datasets can't load it ({type(error).__name__}: {reason}); it is {kind}: expected a data set of "
            "save_to_disk, Parquet files, or an id of the hub, org/name or org/name:config"
        ) from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _columns(datasets: Any, dataset: Any, root: Path, rename: dict[str, str]) -> dict[str, str]:
    """Return the columns that are used, with their names here. The one of the audio becomes `file`."""
    features = dataset.features
    audio = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if len(audio) != 1:
        kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise RetortError(
            f"{root}: expected one column of type Audio, got {' and '.join(audio) or 'none'}; it has {kinds}; use "
            "`cast_column` or `remove_columns` of datasets, and save_to_disk"
        )
    # A class label has the dtype of its number; lists and other nested columns have no dtype.
    names = [name for name, feature in features.items() if _SCALAR.match(str(getattr(feature, "dtype", "")))]
    return {audio[0]: "file"} | renamed_columns(root, names, rename)


def _list_split(
    datasets: Any, dataset: Any, split: str, root: Path, columns: dict[str, str]
) -> Iterator[ListedUtterance]:
    audio, *others = columns
    classes = {name: feature for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)}
    cells = dataset.select_columns([audio]).cast_column(audio, datasets.Audio(decode=False))
    rows = iter(dataset.select_columns(others)) if others else iter([{}] * len(dataset))
    for number, (path, has_bytes) in enumerate(_paths(cells, audio)):
        row = next(rows)
        for name, feature in classes.items():
            # -1 stands for a label that is not known, as in many test splits.
            row[name] = feature.int2str(row[name]) if row[name] is not None and row[name] >= 0 else None
        values = {columns[name]: as_text(row[name]) for name in others}
        place = Path(str(root), split, str(number))
        yield ListedUtterance(
            file=place if has_bytes or not path else root / path,
            id=values.pop("id", "") or f"{split}/{number:08d}",
            split=split,
            speaker=values.get("speaker") or UNKNOWN_SPEAKER,
            labels=values,
            data=Cell(cells, dataset._fingerprint, number) if has_bytes else None,
        )


def _paths(cells: Any, audio: str) -> Iterator[tuple[str, bool]]:
    """Yield for each row the path of its audio ("" for none), and whether the row holds the bytes."""
    for table in cells.with_format("arrow").iter(_ROWS):
        for chunk in table.column(audio).chunks:
            yield from zip(
                (path or "" for path in chunk.field("path").to_pylist()),
                chunk.field("bytes").is_valid().to_pylist(),
                strict=True,
            )
