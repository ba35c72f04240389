"""Speech Commands v1 with its own test archive."""

from collections.abc import Iterator
from pathlib import Path

import soundfile

from extract.errors import RetortError
from pipelines.readers.source import ReaderOptions, Source, layout_error, read_lines


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
    dev = set(" ".join(read_lines(base / "validation_list.txt")).split())
    held_out = set(" ".join(read_lines(base / "testing_list.txt")).split())
    sources = []
    for file in sorted(base.glob("[!_]*/*.wav")):
        name = file.relative_to(base).as_posix()
        if name not in held_out:
            keyword = file.parent.name if file.parent.name in KEYWORDS else "_unknown_"
            sources.append(_command(file, base, "dev" if name in dev else "train", keyword))
    for file in sorted((base / "_background_noise_").glob("*.wav")):
        sources += _silences(file)
    sources += [_command(file, test, "test", file.parent.name) for file in sorted(test.glob("*/*.wav"))]
    return sources


KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_KEYWORD_GAIN_DB = -3.0  # SUPERB's KS
_SPEECH_COMMANDS_TREE = (
    "speech_commands_v0.01/{WORD/*.wav,_background_noise_/*.wav,validation_list.txt,testing_list.txt} "
    "and speech_commands_test_set_v0.01/{WORD,_silence_,_unknown_}/*.wav"
)


def _command(file: Path, base: Path, split: str, keyword: str) -> Source:
    return Source(
        file=file,
        id=f"{split}/{file.relative_to(base).with_suffix('').as_posix()}",
        split=split,
        speaker=file.stem.split("_nohash_")[0],
        labels={"keyword": keyword},
        gain_db=_KEYWORD_GAIN_DB,
    )


def _silences(file: Path) -> Iterator[Source]:
    seconds = int(_duration_s(file))
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


def _duration_s(file: Path) -> float:
    try:
        return float(soundfile.info(file).duration)
    except soundfile.LibsndfileError as error:
        raise RetortError(f"{file} can't be read as audio ({error.error_string})") from None
