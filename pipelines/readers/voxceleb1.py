"""VoxCeleb1: speakers."""

from pathlib import Path

from extract.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, layout_error


def read_voxceleb1(root: Path, options: ReaderOptions) -> list[Source]:
    """VoxCeleb1 for speaker identification: {dev,test}/wav/ID/VIDEO/N.wav and iden_split.txt; label `speaker`."""
    split_file = root / "iden_split.txt"
    if not split_file.is_file():
        raise layout_error(root, "VoxCeleb1", "iden_split.txt", _VOXCELEB_TREE)
    splits = {"1": "train", "2": "dev", "3": "test"}
    sources = []
    for line in split_file.read_text().splitlines():
        number, _, name = line.strip().partition(" ")
        if number not in splits:
            raise RetortError(f"{split_file}: line {line!r} does not begin with 1 (train), 2 (dev) or 3 (test)")
        speaker = name.split("/")[0]
        file = next((path for part in ("dev", "test") if (path := root / part / "wav" / name).is_file()), None)
        if file is None:
            raise layout_error(
                root, "VoxCeleb1", f"{{dev,test}}/wav/{name}, which iden_split.txt lists", _VOXCELEB_TREE
            )
        sources.append(
            Source(
                file=file,
                id=name.removesuffix(".wav"),
                split=splits[number],
                speaker=speaker,
                labels={"speaker": speaker},
            )
        )
    return sources


_VOXCELEB_TREE = "iden_split.txt and {dev,test}/wav/idNNNNN/VIDEO/NNNNN.wav"
