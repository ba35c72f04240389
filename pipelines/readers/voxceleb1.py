"""VoxCeleb1: speaker identification by its split file, and speaker verification by its trial list."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.source import (
    ReaderOptions,
    Source,
    audio_file,
    check_any_there,
    layout_error,
    read_lines,
    visible_audio,
)


def read_voxceleb1(root: Path, options: ReaderOptions) -> list[Source]:
    """VoxCeleb1 for speaker identification: {dev,test}/wav/ID/VIDEO/N.wav and iden_split.txt; label `speaker`."""
    split_file = root / "iden_split.txt"
    if not split_file.is_file():
        raise layout_error(root, "VoxCeleb1", "iden_split.txt", _VOXCELEB_TREE)
    splits = {"1": "train", "2": "dev", "3": "test"}
    sources = []
    for line in read_lines(split_file):
        number, *names = line.split()
        if number not in splits or len(names) != 1:
            raise RetortError(
                f"{split_file}: line {line!r} does not begin with 1 (train), 2 (dev) or 3 (test) and a path"
            )
        name = names[0].removesuffix(".wav")
        speaker = name.split("/")[0]
        places = [audio_file(root / part / "wav" / name, _SUFFIXES) for part in ("dev", "test")]
        sources.append(
            Source(
                file=next((path for path in places if path.is_file()), places[0]),
                id=name,
                split=splits[number],
                speaker=speaker,
                labels={"speaker": speaker},
            )
        )
    check_any_there(sources, root, "VoxCeleb1", split_file.name, _VOXCELEB_TREE)
    return sources


def read_voxceleb1_trials(root: Path, options: ReaderOptions) -> list[Source]:
    """VoxCeleb1 for speaker verification: all of dev/wav, and of test/wav what the trial list names; -3 dB, trimmed.

    The speakers of dev/wav train, in utterances of 2 s and more; 40 of them (a fifth where there are few), by the
    digest of their names, are held out whole as split dev. The reference trains on them too and has no dev trials.
    """
    folder = root / "dev" / "wav"
    files = visible_audio(folder, "*/*/*")
    if not files:
        raise layout_error(root, "VoxCeleb1", "dev/wav/ID/VIDEO/N.wav", _TRIALS_TREE)
    held_out = _held_out({file.parts[-3] for file in files})
    sources = [
        _trimmed(file, file.relative_to(folder), "dev" if file.parts[-3] in held_out else "train") for file in files
    ]
    names = sorted({name for _, *pair in read_trials(root)["trials"] for name in pair})
    folder = root / "test" / "wav"
    tested = [_trimmed(audio_file(folder / name, _SUFFIXES), Path(f"{name}.wav"), "test") for name in names]
    check_any_there(tested, root, "VoxCeleb1", "the trial list", _TRIALS_TREE)
    return sources + tested


def read_trials(root: Path) -> dict[str, Any]:
    """The published trial list, in its order, as the corpus's metadata: `trials` [[1 or 0, id, id], …], 1 = target."""
    path = next((root / name for name in TRIAL_LISTS if (root / name).is_file()), None)
    if path is None:
        raise layout_error(root, "VoxCeleb1", TRIAL_LISTS[0], _TRIALS_TREE)
    trials: list[list[int | str]] = []
    for line in read_lines(path):
        fields = line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise RetortError(f"{path}: line {line!r} is no trial; expected `1 ID/VIDEO/N.wav ID/VIDEO/N.wav` or `0 …`")
        trials.append([int(fields[0]), *(name.removesuffix(".wav") for name in fields[1:])])
    return {"trials": trials}


def trials_without(metadata: dict[str, Any], dropped: Sequence[Source]) -> dict[str, Any]:
    """Return the metadata without the trials of dropped utterances, and their number as `trials_left_out`."""
    lost = {source.id for source in dropped if source.split == "test"}
    kept = [trial for trial in metadata["trials"] if lost.isdisjoint(trial[1:])]
    if not kept:
        raise RetortError("every trial names an utterance that was dropped; repair the files")
    left_out = len(metadata["trials"]) - len(kept)
    return metadata | ({"trials": kept, "trials_left_out": left_out} if left_out else {})


_SUFFIXES = (".wav", ".flac")
TRIAL_LISTS = ("veri_test2.txt", "voxceleb1_test_v2.txt")  # the cleaned list, as published and as SUPERB renames it
SHORTEST_TRAINING_S = 2.0
_GAIN_DB = -3.0
_HELD_OUT_SPEAKERS = 40  # as many as the published test set has
_VOXCELEB_TREE = "iden_split.txt and {dev,test}/wav/idNNNNN/VIDEO/NNNNN.wav"
_TRIALS_TREE = "veri_test2.txt (lines of `1 ID/VIDEO/N.wav ID/VIDEO/N.wav`) and {dev,test}/wav/idNNNNN/VIDEO/NNNNN.wav"


def _held_out(speakers: set[str]) -> set[str]:
    shuffled = sorted(speakers, key=lambda speaker: hashlib.sha256(speaker.encode()).digest())
    return set(shuffled[: min(_HELD_OUT_SPEAKERS, len(shuffled) // 5)])


def _trimmed(file: Path, name: Path, split: str) -> Source:
    return Source(
        file=file,
        id=name.with_suffix("").as_posix(),
        split=split,
        speaker=name.parts[0],
        gain_db=_GAIN_DB,
        trim_silence=True,
        shortest_s=0.0 if split == "test" else SHORTEST_TRAINING_S,
    )
