"""Fluent Speech Commands: what a spoken command asks for."""

from pathlib import Path

from pipelines.readers.source import ReaderOptions, Source, layout_error, listed_file, read_table


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
        sources += [
            Source(
                file=(file := listed_file(base, row["path"].strip())),
                id=f"{row['speakerId']}/{file.stem}",
                split=split,
                speaker=row["speakerId"],
                labels={"text": row["transcription"]} | {slot: row[slot] for slot in INTENT},
            )
            for row in read_table(table, _COLUMNS)
        ]
    return sources


INTENT = ("action", "object", "location")
_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
_COLUMNS = ("path", "speakerId", "transcription", *INTENT)
_FLUENT_TREE = "fluent_speech_commands_dataset/{data/{train,valid,test}_data.csv,wavs/speakers/SPEAKER/*.wav}"
