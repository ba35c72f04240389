"""Reader of VoxCeleb1 for speaker identification, by its split file."""

from pathlib import Path

from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, audio_file, line_error, read_lines

SUFFIXES = (".wav", ".flac")
_SPLITS = {"1": "train", "2": "dev", "3": "test"}
_LAYOUT = Layout("VoxCeleb1", "iden_split.txt and {dev,test}/wav/idNNNNN/VIDEO/NNNNN.wav")


def list_voxceleb1(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List the files of iden_split.txt, {dev,test}/wav/ID/VIDEO/N.wav; label `speaker`."""
    split_file = root / "iden_split.txt"
    _LAYOUT.require(root, split_file)
    listed = []
    for line in read_lines(split_file):
        number, *names = line.split()
        if number not in _SPLITS or len(names) != 1:
            raise line_error(split_file, line, "1 (train), 2 (dev) or 3 (test) and a path")
        name = names[0].removesuffix(".wav")
        speaker = name.split("/")[0]
        files = [audio_file(root / part / "wav" / name, SUFFIXES) for part in ("dev", "test")]
        listed.append(
            ListedUtterance(
                file=next((file for file in files if file.is_file()), files[0]),
                id=name,
                split=_SPLITS[number],
                speaker=speaker,
                labels={"speaker": speaker},
            )
        )
    _LAYOUT.require_any(root, listed, split_file.name)
    return listed
