"""Fluent Speech Commands: what a spoken command asks for."""

import csv
from pathlib import Path

from extract.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, layout_error


def read_fluent(root: Path, options: ReaderOptions) -> list[Source]:
    """Fluent Speech Commands: data/{train,valid,test}_data.csv and the wavs they name; labels `action`, `object`,
    `location` and `text`."""
    base = root / "fluent_speech_commands_dataset"
    base = base if base.is_dir() else root
    sources = []
    for part, split in _SPLITS.items():
        table = base / "data" / f"{part}_data.csv"
        if not table.is_file():
            raise layout_error(root, "Fluent Speech Commands", f"data/{table.name}", _FLUENT_TREE)
        with table.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if missing := [column for column in _COLUMNS if column not in (rows.fieldnames or ())]:
                raise RetortError(f"{table} has no column {missing[0]!r}; expected {', '.join(_COLUMNS)}")
            sources += [
                Source(
                    file=base / row["path"],
                    id=f"{row['speakerId']}/{Path(row['path']).stem}",
                    split=split,
                    speaker=row["speakerId"],
                    labels={"text": row["transcription"]} | {slot: row[slot] for slot in INTENT},
                )
                for row in rows
            ]
    return sources


INTENT = ("action", "object", "location")
_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
_COLUMNS = ("path", "speakerId", "transcription", *INTENT)
_FLUENT_TREE = "fluent_speech_commands_dataset/{data/{train,valid,test}_data.csv,wavs/speakers/SPEAKER/*.wav}"
