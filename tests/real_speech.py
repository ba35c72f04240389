"""Real speech as folders for the reader `folder`: `python -m tests.real_speech data/real [--data DATA]`.

DATA/fsdd is the Free Spoken Digit Dataset with its metadata.csv, DATA/an4 is CMU AN4 with transcripts.tsv and an4.dic.
Only a metadata.csv of each is written; it names the audio files in DATA.
"""

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path

DATA = Path(os.environ.get("RETORT_REAL_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
Row = dict[str, str]


def fsdd_rows(data: Path = DATA) -> list[Row]:
    """Return rows of digits: the official test indices 0 to 4, of the training indices 5 to 9 for dev."""
    with (data / "fsdd" / "metadata.csv").open() as table:
        return [
            {
                "file": str((data / "fsdd" / row["file"]).resolve()),
                "id": Path(row["file"]).stem,
                "split": "test" if int(row["index"]) < 5 else "dev" if int(row["index"]) < 10 else "train",
                "speaker": row["speaker"],
                "digit": row["digit"],
            }
            for row in csv.DictReader(table)
        ]


def an4_rows(data: Path = DATA) -> list[Row]:
    """Return rows of words and phones: AN4's test speakers; of the others every eighth for dev.

    Utterances with a word that the lexicon lacks are left out.
    """
    lexicon: dict[str, str] = {}
    for line in (data / "an4" / "an4.dic").read_text().splitlines():
        word, *phones = line.split()
        lexicon.setdefault(word, " ".join(phones))
    with (data / "an4" / "transcripts.tsv").open() as table:
        lines = list(csv.DictReader(table, delimiter="\t"))
    rank = {speaker: place for place, speaker in enumerate(sorted({row["speaker"] for row in lines}))}
    return [
        {
            "file": str((data / "an4" / row["file"]).resolve()),
            "id": row["utt_id"],
            "split": "test" if row["split"] == "test" else "dev" if rank[row["speaker"]] % 8 == 0 else "train",
            "speaker": row["speaker"],
            "text": row["text"],
            "phones": " ".join(lexicon[word] for word in row["text"].split()),
        }
        for row in lines
        if row["text"].split() and all(word in lexicon for word in row["text"].split())
    ]


def write_folder(folder: Path, rows: Sequence[Row]) -> Path:
    """Write a metadata.csv of these rows; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    for name, rows in (("fsdd", fsdd_rows(arguments.data)), ("an4", an4_rows(arguments.data))):
        print(f"{write_folder(arguments.out / name, rows)}: {len(rows)} recordings")
