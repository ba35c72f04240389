"""Reader of VoxCeleb1 for speaker verification, by its trial list."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    ReaderOptions,
    audio_file,
    line_error,
    read_lines,
    visible_audio,
)
from pipelines.readers.voxceleb1 import SUFFIXES

TRIAL_LISTS = ("veri_test2.txt", "voxceleb1_test_v2.txt")  # the cleaned list: its published name, SUPERB's name
SHORTEST_TRAINING_S = 2.0
_GAIN_DB = -3.0  # as in SUPERB's ASV
_HELD_OUT_SPEAKERS = 40  # the number of speakers of the published test set
_TRIAL = "`1 ID/VIDEO/N.wav ID/VIDEO/N.wav` or `0 …`"
_LAYOUT = Layout("VoxCeleb1", f"{TRIAL_LISTS[0]} (lines of {_TRIAL}) and {{dev,test}}/wav/idNNNNN/VIDEO/NNNNN.wav")


def list_trials(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List all of dev/wav, and the files of test/wav that the trial list names; -3 dB, without silence.

    The speakers of dev/wav train, in utterances of 2 s and more. Of these, 40 speakers (a fifth where there are fewer
    than 200), chosen by the digest of their names, are the split dev. SUPERB trains on them too and has no dev trials.
    """
    folder = root / "dev" / "wav"
    files = visible_audio(folder, "*/*/*")
    if not files:
        raise _LAYOUT.error(root, "dev/wav/ID/VIDEO/N.wav")
    held_out = _held_out({file.parts[-3] for file in files})
    training = [
        _trimmed(file, file.relative_to(folder), "dev" if file.parts[-3] in held_out else "train") for file in files
    ]
    names = sorted({name for _, *pair in read_trials(root)["trials"] for name in pair})
    test = [_trimmed(audio_file(root / "test" / "wav" / name, SUFFIXES), Path(f"{name}.wav"), "test") for name in names]
    _LAYOUT.require_any(root, test, "the trial list")
    return training + test


def read_trials(root: Path) -> dict[str, Any]:
    """Return the metadata of the corpus: `trials` [[1 or 0, id, id], …] in the published order, 1 = same speaker."""
    path = next((root / name for name in TRIAL_LISTS if (root / name).is_file()), root / TRIAL_LISTS[0])
    _LAYOUT.require(root, path)
    trials: list[list[int | str]] = []
    for line in read_lines(path):
        fields = line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise line_error(path, line, _TRIAL)
        trials.append([int(fields[0]), *(name.removesuffix(".wav") for name in fields[1:])])
    return {"trials": trials}


def trials_without(metadata: dict[str, Any], dropped: Sequence[ListedUtterance]) -> dict[str, Any]:
    """Return the metadata without the trials of dropped utterances, and their number as `trials_left_out`."""
    lost = {utterance.id for utterance in dropped if utterance.split == "test"}
    kept = [trial for trial in metadata["trials"] if lost.isdisjoint(trial[1:])]
    if not kept:
        raise RetortError("every trial names an utterance that was dropped; repair the files")
    left_out = len(metadata["trials"]) - len(kept)
    return metadata | ({"trials": kept, "trials_left_out": left_out} if left_out else {})


def _held_out(speakers: set[str]) -> set[str]:
    shuffled = sorted(speakers, key=lambda speaker: hashlib.sha256(speaker.encode()).digest())
    return set(shuffled[: min(_HELD_OUT_SPEAKERS, len(shuffled) // 5)])


def _trimmed(file: Path, name: Path, split: str) -> ListedUtterance:
    return ListedUtterance(
        file=file,
        id=name.with_suffix("").as_posix(),
        split=split,
        speaker=name.parts[0],
        gain_db=_GAIN_DB,
        trim_silence=True,
        shortest_s=0.0 if split == "test" else SHORTEST_TRAINING_S,  # trials are complete
    )
