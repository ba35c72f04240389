"""Published data set folders -> corpus.h5: which files, which split, speaker and labels; then decoding.

A reader lists a data set's own on-disk layout without opening audio. `read_corpus` decodes what it lists, names every
file that can't be used in one error, and writes the corpus. Run: `python -m pipelines corpus READER ROOT --out C.h5`.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from extract.corpus import SAMPLE_RATE_HZ, Utterance, write_corpus
from extract.errors import RetortError, unknown
from extract.progress import ProgressBar

MIN_SAMPLES = 400  # the receptive field of one frame
_NAMED_AT_MOST = 50  # bad files that one error names
_AHEAD = 64  # files decoded at once


@dataclass(frozen=True, kw_only=True)
class Source:
    """One utterance as its data set holds it. `crop_s` is (start, duration) in seconds; None is the whole file."""

    file: Path
    id: str
    split: str
    speaker: str
    labels: dict[str, str] = field(default_factory=dict)
    crop_s: tuple[float, float] | None = None
    gain_db: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """What the command lets a user choose. `parts` and `lexicon` are LibriSpeech's, `rename` is the folder reader's."""

    parts: tuple[str, ...] = ()
    lexicon: Path | None = None
    rename: dict[str, str] = field(default_factory=dict)


def read_librispeech(root: Path, options: ReaderOptions) -> list[Source]:
    """LibriSpeech: PART/SPEAKER/CHAPTER/ID.flac with its .trans.txt; labels `text` and, with a lexicon, `phones`.

    Parts train-*, dev-clean and test-clean unless `parts` names others. The lexicon (WORD<TAB>PH PH …, the first
    pronunciation of a word counts) is `lexicon` or ROOT/librispeech-lexicon.txt if it is there.
    """
    base = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    there = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name.split("-")[0] in _LIBRISPEECH)
    wanted = options.parts or tuple(part for part in there if not part.endswith("-other"))
    if missing := sorted({*wanted, *([] if wanted else ["train-clean-100"])} - set(there)):
        raise _layout(root, "LibriSpeech", f"{missing[0]}/", _LIBRISPEECH_TREE)
    lexicon_path = options.lexicon or root / "librispeech-lexicon.txt"
    lexicon = _read_lexicon(lexicon_path) if options.lexicon or lexicon_path.is_file() else None
    sources = []
    for part in wanted:
        transcripts = sorted((base / part).glob("*/*/*.trans.txt"))
        if not transcripts:
            raise _layout(base / part, "LibriSpeech", "SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt", _LIBRISPEECH_TREE)
        for transcript in transcripts:
            for line in transcript.read_text(encoding="utf-8").splitlines():
                name, _, text = line.partition(" ")
                labels = {"text": text.strip()}
                if lexicon is not None:
                    labels["phones"] = _pronounce(labels["text"], lexicon, where=f"{transcript}: {name}")
                sources.append(
                    Source(
                        file=transcript.parent / f"{name}.flac",
                        id=name,
                        split=part.split("-")[0],
                        speaker=name.split("-")[0],
                        labels=labels,
                    )
                )
    return sources


_LIBRISPEECH = ("train", "dev", "test")
_LIBRISPEECH_TREE = (
    "LibriSpeech/{train-clean-100,dev-clean,test-clean}/SPEAKER/CHAPTER/{ID.flac,SPEAKER-CHAPTER.trans.txt}"
)


def _read_lexicon(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise RetortError(f"lexicon {path} does not exist; expected lines of WORD<TAB>PHONE PHONE …")
    lexicon: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phones = line.split()
        lexicon.setdefault(word, " ".join(phones))
    return lexicon


def _pronounce(text: str, lexicon: dict[str, str], *, where: str) -> str:
    if odd := [word for word in text.split() if word not in lexicon]:
        raise RetortError(f"{where}: word {odd[0]!r} is not in the lexicon; add its pronunciation there")
    return " ".join(lexicon[word] for word in text.split())


def read_speech_commands(root: Path, options: ReaderOptions) -> list[Source]:
    """Speech Commands v1 with its own test archive, as SUPERB's KS: 12 classes in the label `keyword`, -3 dB.

    Training and dev files by the archive's own lists (its testing list is left out: the test archive is scored). The
    class _silence_ is cut from the noise files in consecutive seconds, the last tenth of each file for dev; the
    reference crops at random.
    """
    base, test = root / "speech_commands_v0.01", root / "speech_commands_test_set_v0.01"
    for needed in (base / "validation_list.txt", base / "testing_list.txt", base / "_background_noise_", test):
        if not needed.exists():
            raise _layout(root, "Speech Commands", needed.relative_to(root).as_posix(), _SPEECH_COMMANDS_TREE)
    dev = set((base / "validation_list.txt").read_text().split())
    held_out = set((base / "testing_list.txt").read_text().split())
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


def read_voxceleb1(root: Path, options: ReaderOptions) -> list[Source]:
    """VoxCeleb1 for speaker identification: {dev,test}/wav/ID/VIDEO/N.wav and iden_split.txt; label `speaker`."""
    split_file = root / "iden_split.txt"
    if not split_file.is_file():
        raise _layout(root, "VoxCeleb1", "iden_split.txt", _VOXCELEB_TREE)
    splits = {"1": "train", "2": "dev", "3": "test"}
    sources = []
    for line in split_file.read_text().splitlines():
        number, _, name = line.strip().partition(" ")
        if number not in splits:
            raise RetortError(f"{split_file}: line {line!r} does not begin with 1 (train), 2 (dev) or 3 (test)")
        speaker = name.split("/")[0]
        file = next((path for part in ("dev", "test") if (path := root / part / "wav" / name).is_file()), None)
        if file is None:
            raise _layout(root, "VoxCeleb1", f"{{dev,test}}/wav/{name}, which iden_split.txt lists", _VOXCELEB_TREE)
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


def read_folder(root: Path, options: ReaderOptions) -> list[Source]:
    """Any tree of audio with a metadata.csv: column `file` is required, `id`, `split` and `speaker` are known, others
    become labels. `rename` maps a column to another name, such as digit to keyword."""
    table = root / "metadata.csv"
    if not table.is_file():
        raise _layout(root, "a folder", "metadata.csv", "metadata.csv with a column `file`, and the files it names")
    with table.open(newline="", encoding="utf-8") as lines:
        rows = [{options.rename.get(key, key): value for key, value in row.items()} for row in csv.DictReader(lines)]
    columns = rows[0].keys() if rows else set()
    if "file" not in columns:
        raise RetortError(f"{table} has columns {', '.join(columns) or '(none)'}; expected one named `file`")
    if missing := [old for old, new in options.rename.items() if new not in columns]:
        raise RetortError(f"--rename {missing[0]}: {table} has no such column; it has {', '.join(columns)}")
    return [
        Source(
            file=root / row["file"],
            id=row.get("id") or Path(row["file"]).with_suffix("").as_posix(),
            split=row.get("split") or "train",
            speaker=row.get("speaker") or "unknown",
            labels={key: value for key, value in row.items() if key not in ("file", "id", "split")},
        )
        for row in rows
    ]


READERS: dict[str, Callable[[Path, ReaderOptions], list[Source]]] = {
    "folder": read_folder,
    "librispeech": read_librispeech,
    "speech-commands": read_speech_commands,
    "voxceleb1": read_voxceleb1,
}


def _layout(root: Path, what: str, missing: str, tree: str) -> RetortError:
    return RetortError(f"{root} is not laid out as {what}: {missing} is missing; expected {tree}")


def read_corpus(
    reader: str, root: Path, out: Path, *, options: ReaderOptions | None = None, skip_bad: bool = False
) -> dict[str, Any]:
    """Read a data set folder into the corpus `out` (an .h5 path) and return its card.

    Raises RetortError for an unknown reader, a folder of another layout, and, unless `skip_bad` (which drops and
    records them), for files that can't be read, are empty, too short for one frame or hold NaN, all named.
    """
    if reader not in READERS:
        raise unknown("reader", reader, READERS)
    if out.suffix != ".h5":
        raise RetortError(f"--out {out}: a corpus is an .h5 file, such as corpora/{out.stem}.h5")
    if not root.is_dir():
        raise RetortError(f"data set folder {root} does not exist; give the folder that holds the {reader} tree")
    sources = READERS[reader](root, options or ReaderOptions())
    bad: list[str] = []
    changed: Counter[str] = Counter()
    record: dict[str, Any] = {}
    with ProgressBar(f"corpus {out.stem}", total=len(sources), unit="files") as bar:
        utterances = _decode_all(sources, bad, changed, skip_bad=skip_bad, bar=bar, record=record)
        return write_corpus(out, name=out.stem, reader=reader, utterances=utterances, record=record)


def _decode_all(
    sources: list[Source],
    bad: list[str],
    changed: Counter[str],
    *,
    skip_bad: bool,
    bar: ProgressBar,
    record: dict[str, Any],
) -> Iterator[Utterance]:
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(sources), _AHEAD):
            group = sources[first : first + _AHEAD]
            for source, decoded in zip(group, pool.map(_decode, group), strict=True):
                if isinstance(decoded, str):
                    bad.append(f"{source.file} ({decoded})")
                    continue
                changed.update(decoded.changes)
                yield Utterance(source.id, decoded.samples, source.split, source.speaker, source.labels)
            bar.advance(len(group))
    if bad and not skip_bad:
        more = f" and {len(bad) - _NAMED_AT_MOST} more" if len(bad) > _NAMED_AT_MOST else ""
        raise RetortError(
            f"{len(bad)} of {len(sources)} files can't be used: {'; '.join(bad[:_NAMED_AT_MOST])}{more}. "
            "Mend them, or drop and record them with --skip-bad"
        )
    record |= {"dropped": bad, "changed": dict(sorted(changed.items()))}


@dataclass(frozen=True)
class _Decoded:
    samples: NDArray[np.int16]
    changes: tuple[str, ...]


def _decode(source: Source) -> _Decoded | str:
    """int16 samples at 16 kHz mono and what was changed on the way; or, as a string, why the file can't be used."""
    try:
        with soundfile.SoundFile(source.file) as file:
            rate = int(file.samplerate)
            if source.crop_s is not None:
                file.seek(round(source.crop_s[0] * rate))
            frames = -1 if source.crop_s is None else round(source.crop_s[1] * rate)
            audio_TC = file.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        return "does not exist" if not source.file.exists() else f"unreadable: {error.error_string}"
    if not np.isfinite(audio_TC).all():
        return "holds NaN or infinite samples"
    if not len(audio_TC):
        return "empty"
    changes = []
    audio_T = audio_TC.mean(axis=1)
    if audio_TC.shape[1] > 1:
        changes.append(f"averaged {audio_TC.shape[1]} channels")
    if rate != SAMPLE_RATE_HZ:
        audio_T = _resample(audio_T, rate)
        changes.append(f"resampled {rate} Hz")
    if source.gain_db:
        audio_T = audio_T * np.float32(10 ** (source.gain_db / 20))
        changes.append(f"gain {source.gain_db:g} dB")
    if len(audio_T) < MIN_SAMPLES:
        return f"{len(audio_T)} samples at 16 kHz, one frame needs {MIN_SAMPLES}"
    return _Decoded(np.clip(np.rint(audio_T * 32_768), -32_768, 32_767).astype(np.int16), tuple(changes))


def _resample(audio_T: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    # Late: most published data sets are 16 kHz already, and torch takes seconds to import.
    import torch
    import torchaudio

    resampled: NDArray[np.float32] = torchaudio.functional.resample(
        torch.from_numpy(audio_T), rate, SAMPLE_RATE_HZ
    ).numpy()
    return resampled
