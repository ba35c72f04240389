"""Reader of Kaldi's data folders: wav.scp, and possibly segments; utt2spk or spk2utt; text."""

import re
from pathlib import Path

from extract.base.errors import RetortError
from pipelines.readers.folder import in_file_order
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    Listing,
    ReaderOptions,
    base_of,
    named,
    part_of,
    read_fields,
    read_lines,
    shown,
    visible,
    with_same_labels,
)
from pipelines.readers.splits import kind_of

_FILES = ("wav.scp", "segments", "utt2spk", "spk2utt", "text")
_LAYOUT = Layout(
    "Kaldi", "{wav.scp,segments,utt2spk,text}, or such a folder for each split: {train,dev,test}/wav.scp …"
)


def list_kaldi(root: Path, options: ReaderOptions) -> Listing:
    """List the utterances of a data folder, or of the data folders below `root`, whose names are the splits.

    Label `text`, empty for folders without one. A recording without segments is an utterance. Commands in wav.scp, the
    output of which would be the audio, are refused: a data set is not trusted to run programs.
    """
    if any((root / name).exists() for name in _FILES):
        folders = {root: root.name if kind_of(root.name) else "train"}
    else:
        folders = {path.parent: path.parent.name for name in _FILES for path in visible(root, f"*/{name}")}
    if not folders:
        raise _LAYOUT.error(root, "wav.scp")
    utterances: list[ListedUtterance] = []
    for folder in sorted(folders):
        utterances += _list_folder(folder, folders[folder])
    tables = [shown(folder / "wav.scp", root) for folder in sorted(folders)]
    return Listing(in_file_order(with_same_labels(utterances)), {"tables": tables})


def _list_folder(folder: Path, split: str) -> list[ListedUtterance]:
    has_speakers = (folder / "utt2spk").exists() or (folder / "spk2utt").exists()
    missing = [] if (folder / "wav.scp").exists() else ["wav.scp"]
    if missing := missing + ([] if has_speakers else ["utt2spk or spk2utt"]):
        raise RetortError(f"{folder}: {' and '.join(missing)} not found; expected the layout of Kaldi: {_LAYOUT.tree}")
    file_of = _read_recordings(folder)
    parts = _read_segments(folder) if (folder / "segments").exists() else {name: (name, None) for name in file_of}
    with_text = (folder / "text").exists()
    speaker_of, text_of = _read_speakers(folder), _read_map(folder / "text") if with_text else {}
    # All inconsistencies are reported at once, as Kaldi's own utils/validate_data_dir.sh does.
    lost = {
        "recordings of segments that wav.scp lacks": sorted(
            {recording for recording, _ in parts.values()} - {*file_of}
        ),
        "utterances that utt2spk lacks": [name for name in parts if name not in speaker_of],
        "utterances that text lacks": [name for name in parts if with_text and name not in text_of],
    }
    if problems := [f"{len(names)} {what} ({named(names)})" for what, names in lost.items() if names]:
        raise RetortError(f"{folder}: {'; '.join(problems)}; add or remove them (Kaldi's utils/fix_data_dir.sh does)")
    return [
        ListedUtterance(
            file=file_of[recording],
            id=name,
            split=split,
            speaker=speaker_of[name],
            labels={"text": text_of[name]} if with_text else {},
            crop_s=crop_s,
        )
        for name, (recording, crop_s) in parts.items()
    ]


def _read_recordings(folder: Path) -> dict[str, Path]:
    """Read wav.scp: recording -> file. Relative paths are those of the folder in which the recipe ran, above this."""
    scp = folder / "wav.scp"
    path_of = _read_map(scp)
    for recording, path in path_of.items():
        kind = "a command, which is not run" if path.endswith("|") or path.startswith("|") else ""
        kind = "a place in an archive" if re.search(r"\.ark:\d+$", path) else kind
        if kind or not path:
            raise RetortError(
                f"{scp}: entry {recording!r} is {kind or 'empty'}; expected the path of an audio file: write the audio "
                "to files, with Kaldi's wav-copy, and list those"
            )
    base = base_of([*path_of.values()], [folder, folder.parent, folder.parent.parent, Path()])
    return {recording: base / path for recording, path in path_of.items()}


def _read_segments(folder: Path) -> dict[str, tuple[str, tuple[float, float] | None]]:
    """Read segments: utterance -> recording, and (start, duration) of the part in seconds."""
    parts: dict[str, tuple[str, tuple[float, float] | None]] = {}
    path = folder / "segments"
    for name, recording, start, end in read_fields(path, 4, "`UTTERANCE RECORDING START END`"):
        if name in parts:
            raise RetortError(
                f"{path}: utterance {name!r} occurs twice, in {parts[name][0]} and {recording}; remove one"
            )
        parts[name] = recording, part_of(start, end, f"{path}: utterance {name!r}")
    return parts


def _read_speakers(folder: Path) -> dict[str, str]:
    if (folder / "utt2spk").exists():
        return _read_map(folder / "utt2spk")
    return {name: speaker for speaker, names in _read_map(folder / "spk2utt").items() for name in names.split()}


def _read_map(path: Path) -> dict[str, str]:
    """Read lines of `KEY VALUE …`. Raises RetortError for a key that occurs twice."""
    value_of: dict[str, str] = {}
    for line in read_lines(path):
        key, *rest = line.split(maxsplit=1)
        value = rest[0].strip() if rest else ""
        if key in value_of:
            raise RetortError(f"{path}: {key!r} occurs twice, as {value_of[key]!r} and {value!r}; remove one")
        value_of[key] = value
    return value_of
