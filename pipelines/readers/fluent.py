"""Reader of Fluent Speech Commands: the intents of spoken commands."""

from pathlib import Path

from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, listed_file
from pipelines.readers.tables import read_table

INTENT = ("action", "object", "location")
_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
_COLUMNS = ("path", "speakerId", "transcription", *INTENT)
_LAYOUT = Layout(
    "Fluent Speech Commands",
    "fluent_speech_commands_dataset/{data/{train,valid,test}_data.csv,wavs/speakers/SPEAKER/*.wav}",
    top="fluent_speech_commands_dataset",
)


def list_fluent(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List data/{train,valid,test}_data.csv and the wavs they name; labels `action`, `object`, `location`, `text`."""
    base = _LAYOUT.base(root)
    listed = []
    for part, split in _SPLITS.items():
        table = base / "data" / f"{part}_data.csv"
        _LAYOUT.require(root, table)
        for row in read_table(table, _COLUMNS):
            file = listed_file(base, row["path"].strip())
            listed.append(
                ListedUtterance(
                    file=file,
                    id=f"{row['speakerId']}/{file.stem}",
                    split=split,
                    speaker=row["speakerId"],
                    labels={"text": row["transcription"]} | {slot: row[slot] for slot in INTENT},
                )
            )
    return listed
