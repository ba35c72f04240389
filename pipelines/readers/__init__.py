"""Published data set folders -> corpus.h5: which files, which split, speaker and labels; then decoding.

A reader, one file a data set, lists that data set's own on-disk layout without opening audio. `read_corpus` decodes
what it lists, names every file that can't be used in one error, and writes the corpus.
Run: `python -m pipelines corpus READER ROOT --out C.h5`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from extract.corpus import SAMPLE_RATE_HZ, Utterance, write_corpus
from extract.errors import RetortError, unknown
from extract.files import check_out, in_main_tree
from extract.progress import ProgressBar
from pipelines.readers.fluent import read_fluent
from pipelines.readers.folder import read_folder
from pipelines.readers.iemocap import read_iemocap
from pipelines.readers.librimix import read_librimix
from pipelines.readers.librispeech import read_librispeech
from pipelines.readers.quesst14 import read_quesst14, read_scope
from pipelines.readers.silence import without_silence
from pipelines.readers.snips import read_snips
from pipelines.readers.source import ReaderOptions, Source
from pipelines.readers.speech_commands import read_speech_commands
from pipelines.readers.voxceleb1 import read_trials, read_voxceleb1, read_voxceleb1_trials

__all__ = ["READERS", "ReaderOptions", "Source", "read_corpus"]

MIN_SAMPLES = 400  # the receptive field of one frame
_NAMED_AT_MOST = 50  # bad files that one error names
_AHEAD = 64  # files decoded at once

READERS: dict[str, Callable[[Path, ReaderOptions], list[Source]]] = {
    "fluent": read_fluent,
    "folder": read_folder,
    "iemocap": read_iemocap,
    "librispeech": read_librispeech,
    "snips": read_snips,
    "librimix": read_librimix,
    "quesst14": read_quesst14,
    "speech-commands": read_speech_commands,
    "voxceleb1": read_voxceleb1,
    "voxceleb1-trials": read_voxceleb1_trials,
}

# What belongs to a corpus as a whole, of the readers that know such a thing.
METADATA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "quesst14": read_scope,
    "voxceleb1-trials": read_trials,
}


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
    check_out(in_main_tree(out), "--out")
    check_out(out.with_suffix(".json"), "--out")
    if not root.is_dir():
        raise RetortError(f"data set folder {root} does not exist; give the folder that holds the {reader} tree")
    options = options or ReaderOptions()
    for option, given, takes in (
        ("--part", options.parts, "librispeech"),
        ("--lexicon", options.lexicon, "librispeech"),
        ("--rename", options.rename, "folder"),
    ):
        if given and reader != takes:
            raise RetortError(f"{option} is for the reader `{takes}`; `{reader}` takes none")
    sources = READERS[reader](root, options)
    metadata = METADATA[reader](root) if reader in METADATA else {}
    bad: list[str] = []
    changed: Counter[str] = Counter()
    record: dict[str, Any] = {}
    with ProgressBar(f"corpus {out.stem}", total=len(sources), unit="files") as bar:
        utterances = _decode_all(sources, bad, changed, skip_bad=skip_bad, bar=bar, record=record)
        return write_corpus(out, name=out.stem, reader=reader, utterances=utterances, metadata=metadata, record=record)


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
                if len(decoded.samples) < source.shortest_s * SAMPLE_RATE_HZ:
                    changed[f"left out, shorter than {source.shortest_s:g} s"] += 1
                    continue
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
    if source.trim_silence and len(kept_T := without_silence(audio_T, SAMPLE_RATE_HZ)) < len(audio_T):
        audio_T = kept_T
        changes.append("cut silence")
    if len(audio_T) < MIN_SAMPLES and not source.shortest_s:
        return f"{len(audio_T)} samples at 16 kHz, one frame needs {MIN_SAMPLES}"
    return _Decoded(np.clip(np.rint(audio_T * 32_768), -32_768, 32_767).astype(np.int16), tuple(changes))


def _resample(audio_T: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    from extract.audio import resample  # late: most data sets are 16 kHz already, and torch takes seconds to import

    return resample(audio_T, rate, SAMPLE_RATE_HZ)
