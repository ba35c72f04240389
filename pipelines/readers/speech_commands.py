"""Speech Commands v1 with its own test archive."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.readers.decode import duration_s
from pipelines.readers.source import ReaderOptions, Source, layout_error, read_lines, visible_audio


def read_speech_commands(root: Path, options: ReaderOptions) -> list[Source]:
    """Speech Commands v1 with its own test archive, as SUPERB's KS: 12 classes in the label `keyword`, -3 dB.

    Training and dev files by the archive's own lists (its testing list is left out: the test archive is scored). The
    class _silence_ is cut from the noise files in consecutive seconds, the last tenth of each file for dev; the
    reference crops at random.
    """
    base, test = root / "speech_commands_v0.01", root / "speech_commands_test_set_v0.01"
    for needed in (base / "validation_list.txt", base / "testing_list.txt", base / "_background_noise_", test):
        if not needed.exists():
            raise layout_error(root, "Speech Commands", needed.relative_to(root).as_posix(), _SPEECH_COMMANDS_TREE)
    dev, held_out = (_listed(base / f"{name}_list.txt") for name in ("validation", "testing"))
    files = visible_audio(base, "[!_]*/*")
    there = {_name(file, base) for file in files}
    files += [base / file for name, file in dev.items() if name not in there]  # absent, and named as such
    sources = []
    for file in files:
        if (name := _name(file, base)) not in held_out:
            keyword = file.parent.name if file.parent.name in KEYWORDS else "_unknown_"
            sources.append(_command(file, base, "dev" if name in dev else "train", keyword))
    for file in visible_audio(base / "_background_noise_", "*"):
        sources += _silences(file)
    sources += [_command(file, test, "test", file.parent.name) for file in visible_audio(test, "*/*")]
    return sources


KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_KEYWORD_GAIN_DB = -3.0  # SUPERB's KS
_SPEECH_COMMANDS_TREE = (
    "speech_commands_v0.01/{WORD/*.wav,_background_noise_/*.wav,validation_list.txt,testing_list.txt} "
    "and speech_commands_test_set_v0.01/{WORD,_silence_,_unknown_}/*.wav"
)


def _listed(path: Path) -> dict[str, str]:
    """Read a published list: name without suffix -> path."""
    return {Path(file).with_suffix("").as_posix(): file for file in " ".join(read_lines(path)).split()}


def _name(file: Path, base: Path) -> str:
    return file.relative_to(base).with_suffix("").as_posix()


def _command(file: Path, base: Path, split: str, keyword: str) -> Source:
    return Source(
        file=file,
        id=f"{split}/{_name(file, base)}",
        split=split,
        speaker=file.stem.split("_nohash_")[0],
        labels={"keyword": keyword},
        gain_db=_KEYWORD_GAIN_DB,
    )


def _silences(file: Path) -> Iterator[Source]:
    """Yield a noise file in seconds; one second of a file that can't be read, so that decoding names it."""
    seconds = int(duration_s(file) or 1)
    for second in range(seconds):
        split = "dev" if second >= seconds - max(1, seconds // 10) else "train"
        yield Source(
            file=file,
            id=f"{split}/_silence_/{file.stem}-{second:04d}",
            split=split,
            speaker=file.stem,
            labels={"keyword": "_silence_"},
            crop_s=(float(second), 1.0),
            gain_db=_KEYWORD_GAIN_DB,
        )
