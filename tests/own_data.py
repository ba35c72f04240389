"""Audio and readings of own data, for the tests of its readers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from extract.base.errors import RetortError
from extract.corpus import Corpus
from pipelines.readers import ReaderOptions, read_corpus

RATE = 16_000
NOISE = np.random.default_rng(0).integers(-3_000, 3_000, 4 * RATE).astype(np.int16)
WHOLE = ReaderOptions(dev_share=0.0)


def write_audio(*paths: Path, audio: np.ndarray = NOISE, rate: int = RATE, **options: Any) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, rate, **options)


def read(reader: str, root: Path, out: Path, **options: Any) -> Corpus:
    read_corpus(reader, root, out, options=ReaderOptions(**{"dev_share": 0.0} | options))
    return Corpus.open(out.with_suffix(".json"))


def refused(reader: str, root: Path, out: Path, **options: Any) -> str:
    with pytest.raises(RetortError) as caught:
        read(reader, root, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not out.with_suffix(".json").exists()
    return str(caught.value)


def rows_of(corpus: Corpus, *labels: str) -> list[tuple[str, ...]]:
    columns = [corpus.ids, corpus.splits, corpus.speakers, *(corpus.label(name) for name in labels)]
    return sorted(zip(*columns, strict=True))
