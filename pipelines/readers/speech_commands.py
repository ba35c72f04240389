"""Reader of Speech Commands v1 with its own test archive."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.readers.decode import duration_s
from pipelines.readers.listing import Layout, ListedUtterance, ReaderOptions, read_lines, visible_audio

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_GAIN_DB = -3.0  # as in SUPERB's KS
_LAYOUT = Layout(
    "Speech Commands",
    "speech_commands_v0.01/{WORD/*.wav,_background_noise_/*.wav,validation_list.txt,testing_list.txt} "
    "and speech_commands_test_set_v0.01/{WORD,_silence_,_unknown_}/*.wav",
)


def list_speech_commands(root: Path, options: ReaderOptions) -> list[ListedUtterance]:
    """List SUPERB's KS: 12 classes in the label `keyword`, -3 dB.

    Training and dev files are those of the archive's own lists (its testing list is left out: the test archive is
    scored). The class _silence_ has consecutive seconds of the noise files, the last tenth of each file for dev;
    SUPERB's code crops at random.
    """
    base, test = root / "speech_commands_v0.01", root / "speech_commands_test_set_v0.01"
    lists = [base / "validation_list.txt", base / "testing_list.txt"]
    _LAYOUT.require(root, *lists, base / "_background_noise_", test)
    dev, held_out = map(_read_list, lists)
    files = visible_audio(base, "[!_]*/*")
    present = {_name(file, base) for file in files}
    files += [base / file for name, file in dev.items() if name not in present]  # to be reported as missing
    listed = []
    for file in files:
        if (name := _name(file, base)) not in held_out:
            keyword = file.parent.name if file.parent.name in KEYWORDS else "_unknown_"
            listed.append(_clip(file, base, "dev" if name in dev else "train", keyword))
    for file in visible_audio(base / "_background_noise_", "*"):
        listed += _silences(file)
    return listed + [_clip(file, test, "test", file.parent.name) for file in visible_audio(test, "*/*")]


def _read_list(path: Path) -> dict[str, str]:
    """Read a published list: name without suffix -> path."""
    return {Path(file).with_suffix("").as_posix(): file for file in " ".join(read_lines(path)).split()}


def _name(file: Path, base: Path) -> str:
    return file.relative_to(base).with_suffix("").as_posix()


def _clip(file: Path, base: Path, split: str, keyword: str) -> ListedUtterance:
    return ListedUtterance(
        file=file,
        id=f"{split}/{_name(file, base)}",
        split=split,
        speaker=file.stem.split("_nohash_")[0],
        labels={"keyword": keyword},
        gain_db=_GAIN_DB,
    )


def _silences(file: Path) -> Iterator[ListedUtterance]:
    """Yield the seconds of a noise file; one second of an unreadable file, so that decoding reports it."""
    seconds = int(duration_s(file) or 1)
    for second in range(seconds):
        split = "dev" if second >= seconds - max(1, seconds // 10) else "train"
        yield ListedUtterance(
            file=file,
            id=f"{split}/_silence_/{file.stem}-{second:04d}",
            split=split,
            speaker=file.stem,
            labels={"keyword": "_silence_"},
            crop_s=(float(second), 1.0),
            gain_db=_GAIN_DB,
        )
