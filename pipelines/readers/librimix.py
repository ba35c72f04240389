"""LibriMix for diarisation: two-speaker mixtures, and the Kaldi data folders that say who speaks when."""

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from extract.base.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, check_any_there, layout_error, read_lines


def read_librimix(root: Path, options: ReaderOptions) -> list[Source]:
    """Libri2Mix, 16 kHz, max, by its Kaldi folders data/{train,dev,test}; labels `segments` and `rttm`.

    Both labels are lists of turns, `SPEAKER START END; …` in seconds: `segments` (with utt2spk) are what SUPERB's SD
    trains on, `rttm` is what it is scored against. Recordings are those of wav.scp, whose paths may be of another
    machine: what follows Libri2Mix/ in them is looked up below the folder given.
    """
    sources: list[Source] = []
    for split in ("train", "dev", "test"):
        folder = root / "data" / split
        for name in ("wav.scp", "segments", "utt2spk", "rttm", "reco2dur"):
            if not (folder / name).is_file():
                raise layout_error(root, "LibriMix", f"data/{split}/{name}", _TREE)
        segments, rttm = _read_segments(folder), _read_rttm(folder / "rttm")
        listed: list[Source] = []
        for line in read_lines(folder / "wav.scp"):
            recording, *rest = line.strip().split(maxsplit=1)
            if not rest:
                raise RetortError(f"{folder / 'wav.scp'}: line {line!r} is not `RECORDING PATH`")
            for file, turns in (("segments", segments), ("rttm", rttm)):
                if recording not in turns:
                    raise RetortError(f"{folder / file} has no turn of recording {recording!r}, which wav.scp lists")
            if rest[0].endswith("|"):
                raise RetortError(f"{folder / 'wav.scp'}: {recording} is read from a command, expected a path")
            listed.append(
                Source(
                    file=_find(root, rest[0]),
                    id=f"{split}/{recording}",
                    split=split,
                    speaker=recording,
                    labels={"segments": _as_label(segments[recording]), "rttm": _as_label(rttm[recording])},
                )
            )
        check_any_there(listed, root, "LibriMix", f"data/{split}/wav.scp", _TREE)
        sources += listed
    return sources


Turn = tuple[str, float, float]  # speaker, start and end in seconds
_TREE = (
    "data/{train,dev,test}/{wav.scp,segments,utt2spk,rttm,reco2dur} "
    "and Libri2Mix/wav16k/max/{train-100,dev,test}/{mix_both,s1,s2}/*.wav"
)


def _read_segments(folder: Path) -> dict[str, list[Turn]]:
    """`segments` (UTTERANCE RECORDING START END) with the speakers of `utt2spk`: recording -> turns."""
    speaker_of = {fields[0]: fields[1] for fields in _fields(folder / "utt2spk", 2, "UTTERANCE SPEAKER")}
    turns = defaultdict(list)
    for utterance, recording, start, end in _fields(folder / "segments", 4, "UTTERANCE RECORDING START END"):
        if utterance not in speaker_of:
            raise RetortError(f"{folder / 'utt2spk'} does not name the speaker of {utterance!r}, a line of segments")
        turns[recording].append((speaker_of[utterance], _seconds(start, folder), _seconds(end, folder)))
    return turns


def _seconds(text: str, where: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise RetortError(f"{where}: {text!r} is no time in seconds")
    return value


def _read_rttm(path: Path) -> dict[str, list[Turn]]:
    turns = defaultdict(list)
    for fields in (line.split() for line in read_lines(path)):
        if fields[0] != "SPEAKER" or len(fields) < 8:
            raise RetortError(
                f"{path}: line {' '.join(fields)!r} is no turn; expected "
                "`SPEAKER RECORDING 1 START DURATION <NA> <NA> SPEAKER …`"
            )
        start = _seconds(fields[3], path)
        turns[fields[1]].append((fields[7], start, start + _seconds(fields[4], path)))
    return turns


def _fields(path: Path, count: int, names: str) -> Iterable[tuple[str, ...]]:
    for line in read_lines(path):
        fields = tuple(line.split())
        if len(fields) != count:
            raise RetortError(f"{path}: line {line!r} has {len(fields)} fields; expected {names}")
        yield fields


def _find(root: Path, path: str) -> Path:
    """Return the file that wav.scp names, or its place below the folder given, where it may be absent."""
    named = root / path
    return named if named.is_file() else root / path[max(path.find("Libri2Mix/"), 0) :].lstrip("/")


def _as_label(turns: list[Turn]) -> str:
    return "; ".join(f"{speaker} {start:g} {end:.6g}" for speaker, start, end in turns)
