"""Reader of LibriMix for diarisation: two-speaker mixtures, and Kaldi data folders with the turns of the speakers."""

from collections import defaultdict
from pathlib import Path

from extract.base.errors import RetortError
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    ReaderOptions,
    line_error,
    read_fields,
    read_lines,
    read_seconds,
)

Turn = tuple[str, float, float]  # speaker, start and end in seconds
_KALDI_FILES = ("wav.scp", "segments", "utt2spk", "rttm", "reco2dur")
_LAYOUT = Layout(
    "LibriMix",
    "data/{train,dev,test}/{wav.scp,segments,utt2spk,rttm,reco2dur} "
    "and Libri2Mix/wav16k/max/{train-100,dev,test}/{mix_both,s1,s2}/*.wav",
)


def list_librimix(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List Libri2Mix, 16 kHz, max, by its Kaldi folders data/{train,dev,test}; labels `segments` and `rttm`.

    Both labels are lists of turns, `SPEAKER START END; …` in seconds: SUPERB's SD trains on `segments` (with utt2spk)
    and scores against `rttm`. Recordings are those of wav.scp, whose paths may be of another machine: their part from
    Libri2Mix/ on is then taken relative to `root`.
    """
    listed: list[ListedUtterance] = []
    for split in ("train", "dev", "test"):
        folder = root / "data" / split
        _LAYOUT.require(root, *(folder / name for name in _KALDI_FILES))
        turns = {"segments": _read_segments(folder), "rttm": _read_rttm(folder / "rttm")}
        mixtures = []
        for line in read_lines(folder / "wav.scp"):
            recording, *rest = line.strip().split(maxsplit=1)
            if not rest or rest[0].endswith("|"):  # Kaldi's form of a command whose output is the audio
                raise line_error(folder / "wav.scp", line, "`RECORDING PATH`, not a command")
            for name, of_recording in turns.items():
                if recording not in of_recording:
                    raise RetortError(
                        f"{folder / name}: recording {recording!r} of wav.scp not found; add its turns, or remove it"
                    )
            mixtures.append(
                ListedUtterance(
                    file=_find(root, rest[0]),
                    id=f"{split}/{recording}",
                    split=split,
                    speaker=recording,
                    labels={name: _as_label(of_recording[recording]) for name, of_recording in turns.items()},
                )
            )
        _LAYOUT.require_any(root, mixtures, f"data/{split}/wav.scp")
        listed += mixtures
    return listed


def _read_segments(folder: Path) -> dict[str, list[Turn]]:
    """Read `segments` with the speakers of `utt2spk`: recording -> turns."""
    speaker_of = dict(read_fields(folder / "utt2spk", 2, "`UTTERANCE SPEAKER`"))
    turns = defaultdict(list)
    expected = "`UTTERANCE RECORDING START END`"
    for utterance, recording, start, end in read_fields(folder / "segments", 4, expected):
        if utterance not in speaker_of:
            raise RetortError(f"{folder / 'utt2spk'}: utterance {utterance!r} of segments not found; add its speaker")
        turns[recording].append((speaker_of[utterance], read_seconds(start, folder), read_seconds(end, folder)))
    return turns


def _read_rttm(path: Path) -> dict[str, list[Turn]]:
    turns = defaultdict(list)
    for line in read_lines(path):
        fields = line.split()
        if fields[0] != "SPEAKER" or len(fields) < 8:
            raise line_error(path, line, "`SPEAKER RECORDING 1 START DURATION <NA> <NA> SPEAKER …`")
        start = read_seconds(fields[3], path)
        turns[fields[1]].append((fields[7], start, start + read_seconds(fields[4], path)))
    return turns


def _find(root: Path, path: str) -> Path:
    """Return the file that wav.scp names, or its path below `root`, where it may be missing."""
    named = root / path
    return named if named.is_file() else root / path[max(path.find("Libri2Mix/"), 0) :].lstrip("/")


def _as_label(turns: list[Turn]) -> str:
    return "; ".join(f"{speaker} {start:g} {end:.6g}" for speaker, start, end in turns)
