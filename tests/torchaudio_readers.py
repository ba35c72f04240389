"""Comparison of our readers with torchaudio's over one folder: the same files with the same labels."""

from collections.abc import Callable
from pathlib import Path

from torchaudio.datasets import IEMOCAP, FluentSpeechCommands, Snips

from pipelines.readers import READERS, ReaderOptions
from pipelines.readers.iemocap import EMOTIONS
from pipelines.readers.snips import SPEAKERS

Row = tuple[str, dict[str, str]]  # path below the data set's folder, labels and speaker


def fluent(root: Path) -> dict[str, list[Row]]:
    parts = {"train": "train", "dev": "valid", "test": "test"}
    rows: dict[str, list[Row]] = {}
    for split, part in parts.items():
        theirs = FluentSpeechCommands(root, subset=part)
        for index in range(len(theirs)):
            path, _, _, speaker, text, action, thing, location = theirs.get_metadata(index)
            known = {"text": text, "action": action, "object": thing, "location": location, "speaker": speaker}
            rows.setdefault(split, []).append((f"fluent_speech_commands_dataset/{path}", known))
    return rows


def iemocap(root: Path) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for number in range(1, 6):
        theirs = IEMOCAP(root, sessions=(number,))
        for index in range(len(theirs)):
            path, _, _, emotion, _ = theirs.get_metadata(index)
            if emotion in EMOTIONS:  # torchaudio lists frustration too
                rows.setdefault(f"Session{number}", []).append((f"IEMOCAP/{path}", {"emotion": EMOTIONS[emotion]}))
    return rows


def snips(root: Path) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for split, part in {"train": "train", "dev": "valid", "test": "test"}.items():
        for audio_format in ("wav", "mp3"):
            theirs = Snips(root, subset=part, speakers=list(SPEAKERS[part]), audio_format=audio_format)
            for index in range(len(theirs)):
                path, _, name, text, slots, intent = theirs.get_metadata(index)
                known = {"text": text, "slots": slots, "intent": intent, "speaker": name.split("-")[0]}
                rows.setdefault(split, []).append((f"SNIPS/{path}", known))
    return rows


THEIRS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {"fluent": fluent, "iemocap": iemocap, "snips": snips}


def same_as_torchaudio(reader: str, root: Path) -> int:
    """Assert that both list the same files, splits and labels; return their number."""
    theirs = THEIRS[reader](root)
    ours: dict[str, list[Row]] = {}
    for utterance in READERS[reader].list_data_set(root, ReaderOptions()).utterances:
        known = utterance.labels | {"speaker": utterance.speaker}
        shown = next(iter(theirs.values()))[0][1].keys()
        row = utterance.file.relative_to(root).as_posix(), {name: known[name] for name in shown}
        ours.setdefault(utterance.split, []).append(row)
    assert ours.keys() == theirs.keys()
    for split, rows in ours.items():
        assert sorted(rows, key=repr) == sorted(theirs[split], key=repr)
    return sum(map(len, ours.values()))
