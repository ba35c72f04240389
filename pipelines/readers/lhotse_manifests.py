"""Reader of lhotse's manifests: cuts, or recordings with their supervisions. lhotse loads them (extra `data`)."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from pipelines.readers.decode import FRAME_S
from pipelines.readers.folder import in_file_order, split_in
from pipelines.readers.listing import (
    Layout,
    ListedUtterance,
    Listing,
    ReaderOptions,
    base_of,
    import_optional,
    named,
    shown,
    visible,
    with_same_labels,
)
from pipelines.readers.splits import UNKNOWN_SPEAKER
from pipelines.readers.tables import as_text

_KINDS = ("cuts", "recordings", "supervisions")
_SUFFIX = re.compile(r"\.jsonl(\.gz)?$")
_LAYOUT = Layout(
    "lhotse",
    "NAME_cuts_SPLIT.jsonl.gz, or NAME_recordings_SPLIT.jsonl.gz and NAME_supervisions_SPLIT.jsonl.gz",
)
# lhotse and json raise these for a file that is not a manifest; gzip raises OSError and EOFError.
_NOT_A_MANIFEST = (ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError, EOFError)


def check_manifests(reader: str, root: Path) -> None:
    """Raise RetortError unless the root exists: a folder of manifests, or one manifest."""
    if not root.exists():
        raise RetortError(f"{root} not found; give the folder of the manifests of {reader}, or a .jsonl(.gz) file")


def list_lhotse(root: Path, options: ReaderOptions) -> Listing:
    """List the cuts of a folder of manifests, or of one manifest; labels of the supervisions: text, language, custom.

    A cut is an utterance. Of a cut with several supervisions, and of recordings, each supervision is one.
    """
    lhotse = import_optional("lhotse", "lhotse>=1.31")
    manifests = list(_manifests(root))
    utterances = [
        _utterance(lhotse, cut, _split_of(found["cuts" if "cuts" in found else "recordings"].name), root)
        for found in manifests
        for cut in _cuts(lhotse, found)
    ]
    # Relative paths are those of the folder in which the manifests were made.
    folder = root if root.is_dir() else root.parent
    names = [str(utterance.file) for utterance in utterances]
    base = base_of(names, [Path(), folder, folder.parent, folder.parent.parent])
    utterances = with_same_labels([replace(one, file=base / one.file) for one in utterances])
    paths = [shown(path, root.parent if root.is_file() else root) for found in manifests for path in found.values()]
    return Listing(in_file_order(utterances), {"tables": paths})


def _manifests(root: Path) -> Iterator[dict[str, Path]]:
    """Yield the manifests of each split: its cuts, or its recordings and, where they exist, supervisions."""
    if root.is_file():
        if not _SUFFIX.search(root.name):
            raise RetortError(f"{root}: expected a manifest, .jsonl or .jsonl.gz; convert it with `lhotse copy`")
        yield {"cuts": root}
        return
    of_part: dict[str, dict[str, Path]] = {}
    for path in visible(root, "*"):
        if _SUFFIX.search(path.name) and (kind := re.search("|".join(_KINDS), path.name)):
            of_part.setdefault(path.name.replace(kind[0], "*", 1), {})[kind[0]] = path
    if not of_part:
        raise _LAYOUT.error(root, "NAME_cuts_SPLIT.jsonl.gz or NAME_recordings_SPLIT.jsonl.gz")
    for part, found in of_part.items():
        if not {"cuts", "recordings"} & {*found}:
            raise _LAYOUT.error(root, f"{part.replace('*', 'recordings')}, the recordings of the supervisions,")
        yield {"cuts": found["cuts"]} if "cuts" in found else found


def _split_of(name: str) -> str:
    """Return the split in the name of a manifest: the text after its kind, as lhotse writes it, or a usual name."""
    stem = _SUFFIX.sub("", name)
    after = re.search(f"(?:{'|'.join(_KINDS)})[_-](.+)$", stem)
    return after[1] if after else split_in(stem) or "train"


def _cuts(lhotse: Any, found: dict[str, Path]) -> Iterator[Any]:
    """Yield the cuts of a split, each with one supervision at most."""
    if "cuts" in found:
        for cut in _items(lhotse, found["cuts"], lhotse.cut.Cut):
            yield from cut.trim_to_supervisions(keep_overlapping=False) if len(cut.supervisions) > 1 else [cut]
        return
    recordings = lhotse.RecordingSet.from_recordings(_items(lhotse, found["recordings"], lhotse.Recording))
    if "supervisions" not in found:
        yield from lhotse.CutSet.from_manifests(recordings)
        return
    segments = list(_items(lhotse, found["supervisions"], lhotse.SupervisionSegment))
    if lost := sorted({one.recording_id for one in segments} - {*recordings.ids}):
        raise RetortError(
            f"{found['supervisions']}: {len(lost)} recordings ({named(lost)}) not found in {found['recordings']}; add "
            "them, or remove their supervisions (`lhotse fix` does)"
        )
    supervisions = lhotse.SupervisionSet.from_segments(segments)
    for cut in lhotse.CutSet.from_manifests(recordings, supervisions):
        yield from cut.trim_to_supervisions(keep_overlapping=False)


def _items(lhotse: Any, path: Path, kind: type) -> Iterator[Any]:
    """Yield the items of a manifest. Raises RetortError for a file that lhotse does not load, and for another kind."""
    try:
        for item in lhotse.load_manifest_lazy(path) or ():
            if not isinstance(item, kind):
                raise RetortError(
                    f"{path}: holds a {type(item).__name__}, expected a {kind.__name__}; give a manifest of cuts, or a "
                    "folder with recordings and supervisions"
                )
            yield item
    except RetortError:
        raise
    except _NOT_A_MANIFEST as error:
        reason = " ".join(str(error).split())[:200]
        raise RetortError(
            f"{path}: lhotse can't load it ({type(error).__name__}: {reason}); expected one JSON object a line"
        ) from None


def _utterance(lhotse: Any, cut: Any, split: str, root: Path) -> ListedUtterance:
    """Return the utterance of a cut. Raises RetortError for one whose audio is not a part of a file as it is."""
    where = f"{root}: cut {cut.id!r}"
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or not isinstance(cut, lhotse.MonoCut | lhotse.MultiCut):
        kind = "is changed by lhotse when it is loaded" if recording is not None else f"is a {type(cut).__name__}"
        raise RetortError(f"{where} {kind}, expected a part of a recording; write its audio with `lhotse cut export`")
    channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    source = next((one for one in recording.sources if {*channels} <= {*one.channels}), None)
    if source is None or source.type != "file" or (1 < len(channels) < len(source.channels)):
        kinds = ", ".join(sorted({one.type for one in recording.sources}))
        raise RetortError(
            f"{where}: channels {channels} of sources of type {kinds}, expected one channel, or all, of one file; "
            "write the audio to files"
        )
    segment = cut.supervisions[0] if cut.supervisions else None
    whole = cut.start == 0 and abs(cut.duration - recording.duration) < FRAME_S
    return ListedUtterance(
        file=Path(source.source),
        id=cut.id,
        split=split,
        speaker=getattr(segment, "speaker", None) or UNKNOWN_SPEAKER,
        labels=_labels(segment),
        crop_s=None if whole else (cut.start, cut.duration),
        expected_s=recording.duration if whole else None,
        channel=source.channels.index(channels[0]) if len(channels) < len(source.channels) else None,
    )


def _labels(segment: Any) -> dict[str, str]:
    """Return the text, the language and the custom values of a supervision that are text or numbers."""
    if segment is None:
        return {}
    found = {"text": segment.text, "language": segment.language, "gender": segment.gender} | (segment.custom or {})
    return {name: as_text(value) for name, value in found.items() if isinstance(value, str | int | float)}
