"""Random features and labels of a task's shape, in memory: what `evaluate plan` times heads on, before a store exists.

The time of a step does not depend on the values, only on the number of utterances, frames, layers and features. All
utterances have the mean length of the data set: batches of real lengths are sorted, so that they hold little padding.

Shapes: L layers, F frames of a pack, W codes of a frame, U utterances, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate.task import Features
from extract.base.columns import CodedColumn, TextColumn
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.store.codec import Codes
from extract.store.manifest import Format2, Manifest
from extract.store.objects import ObjectList
from extract.store.packing import count_frames, pack_utterances
from extract.store.reader import Pack, StoreReader

_HOP_SAMPLES, _RECEPTIVE_SAMPLES = 320, 400  # of the wav2vec 2.0 family
_FEWEST_PACK_FRAMES = 2048
_TURN_S = 2.0  # of a speaker in a mixture
_CHARACTERS_A_SECOND, _PHONES_A_SECOND = 14.0, 10.0  # of read English

Labels = dict[str, list[str]]


@dataclass(frozen=True)
class Shape:
    """Numbers of layers and features of an upstream."""

    num_layers: int
    dim: int


class RandomReader(StoreReader):
    """Reader of a store whose packs all hold the same random codes. Nothing is on the disk."""

    def __init__(self, corpus: Corpus, shape: Shape) -> None:
        num_frames = count_frames(corpus.num_samples, hop_samples=_HOP_SAMPLES, receptive_samples=_RECEPTIVE_SAMPLES)
        pack_frames = max(_FEWEST_PACK_FRAMES, int(num_frames.max()))
        packing = pack_utterances(num_frames, ids=corpus.ids, pack_frames=pack_frames, shard_packs=1)
        super().__init__(_manifest(corpus, shape, packing.summary()), source=corpus.path)
        self.pack_of, self.first_frame, self.num_frames = packing.pack, packing.first_frame, packing.num_frames
        generator = np.random.default_rng(0)
        size = (shape.num_layers, pack_frames, self.codec.width(shape.dim))
        self.codes_LFW = generator.integers(-127, 128, size).astype(self.codec.dtype)
        self.scale_LD = np.full((shape.num_layers, shape.dim), 1 / 127, dtype=np.float32)

    def pack(
        self,
        index: int,
        layers: Sequence[int] | None = None,
        *,
        frames: slice = slice(None),
        out: Codes | None = None,
    ) -> Pack:
        assert out is None, "heads read packs into memory of their own"
        rows, utterances = self._rows(layers), self.utterances_of(index)
        return Pack(
            self.codes_LFW[rows, frames],
            self.scale_LD[rows],
            utterances,
            self.first_frame[utterances],
            self.num_frames[utterances],
            self.codec_for(layers),
        )

    def pooled(
        self, indices: NDArray[np.int64] | None = None, layers: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        count = self.num_utterances if indices is None else len(indices)
        generator = np.random.default_rng(1)
        return generator.standard_normal((count, len(self.layers), self.dim), dtype=np.float32)[:, self._rows(layers)]


def random_features(
    task: str, splits: Sequence[str], *, duration_s: float, shape: Shape, device: str = "cpu"
) -> Features:
    """Return features and labels of one utterance a name in `splits`, each of `duration_s` seconds."""
    generator, count = np.random.default_rng(2), len(splits)
    # Four neighbours are of one speaker, in two sessions, which are the part of an id before the last slash.
    speakers = [f"s{index // 4}" for index in range(count)]
    ids = [f"{name}/{index % 2}/{index}" for index, name in enumerate(speakers)]
    tests = [name for name, split in zip(ids, splits, strict=True) if split == "test"]
    metadata = {"trials": [[index % 2, a, b] for index, (a, b) in enumerate(pairwise(tests))]}
    labels = _LABELS[task](generator, count, duration_s) if task in _LABELS else {}
    if task == "qbe":  # every query is in half of the documents
        documents = [name for name, split in zip(ids, splits, strict=True) if split == "docs"][::2]
        labels = {"documents": [" ".join(documents)] * count}
    num_samples = np.full(count, round(duration_s * SAMPLE_RATE_HZ), dtype=np.int64)
    corpus = Corpus(
        path=Path("random"),
        name="random",
        reader="random",
        digest="0" * 64,
        labels_digest="0" * 64,
        ids=_column(ids),
        start=np.zeros(count, dtype=np.int64),
        num_samples=num_samples,
        splits=CodedColumn.of([[split.encode() for split in splits]]),
        speakers=_column(speakers),
        labels={name: _column(values) for name, values in labels.items()},
        metadata=metadata,
    )
    return Features(RandomReader(corpus, shape), corpus, device)


def _column(values: Sequence[str]) -> TextColumn:
    return TextColumn.of([[value.encode() for value in values]])


def _classes(label: str, number: int) -> Callable[[np.random.Generator, int, float], Labels]:
    """Return labels of so many classes, in turn, so that every split has all of them."""
    return lambda generator, count, duration_s: {label: [f"c{index % number}" for index in range(count)]}


def _phones(generator: np.random.Generator, count: int, duration_s: float) -> Labels:
    length = max(1, round(duration_s * _PHONES_A_SECOND))
    return {"phones": [" ".join(f"p{phone}" for phone in row) for row in generator.integers(0, 70, (count, length))]}


def _words(generator: np.random.Generator, count: int, duration_s: float) -> list[list[str]]:
    """Return words of five letters."""
    number = max(2, round(duration_s * _CHARACTERS_A_SECOND / 6))
    letters = generator.integers(ord("A"), ord("Z") + 1, (count, number, 5))
    return [["".join(map(chr, word)) for word in row] for row in letters.tolist()]


def _text(generator: np.random.Generator, count: int, duration_s: float) -> Labels:
    return {"text": [" ".join(words) for words in _words(generator, count, duration_s)]}


def _slots(generator: np.random.Generator, count: int, duration_s: float) -> Labels:
    """Return texts whose every other word is a slot, of 39 types as in SNIPS."""
    words = _words(generator, count, duration_s)
    types = [[f"t{(row + at) % 39}" if at % 2 else "O" for at in range(len(own))] for row, own in enumerate(words)]
    return {"text": [" ".join(own) for own in words], "slots": [" ".join(own) for own in types]}


def _intents(generator: np.random.Generator, count: int, duration_s: float) -> Labels:
    sizes = {"action": 6, "object": 14, "location": 4}  # of Fluent Speech Commands
    return {label: [f"c{index % number}" for index in range(count)] for label, number in sizes.items()}


def _turns(generator: np.random.Generator, count: int, duration_s: float) -> Labels:
    """Return turns of two speakers, each two seconds long and half overlapped."""
    starts = np.arange(0.0, max(duration_s - _TURN_S / 2, _TURN_S / 4), _TURN_S / 2)
    text = "; ".join(
        f"{'ab'[at % 2]} {start:g} {min(start + _TURN_S, duration_s):g}" for at, start in enumerate(starts)
    )
    return {"segments": [text] * count, "rttm": [text] * count}


_LABELS: dict[str, Callable[[np.random.Generator, int, float], Labels]] = {
    "pr": _phones,
    "asr": _text,
    "ks": _classes("keyword", 12),
    "ic": _intents,
    "er": _classes("emotion", 4),
    "sf": _slots,
    "sd": _turns,
}


def _manifest(corpus: Corpus, shape: Shape, plan: dict[str, Any]) -> Manifest:
    return Manifest(
        format_version=2,  # which lists its objects in memory: there are none
        complete=True,
        fingerprint="0" * 64,
        digest="0" * 64,
        upstream={"name": "random"},
        layers=tuple(range(shape.num_layers)),
        dim=shape.dim,
        convention="random",
        hop_samples=_HOP_SAMPLES,
        receptive_samples=_RECEPTIVE_SAMPLES,
        keep=("frames", "pooled"),
        codec="int8",
        codec_error={},
        dtype="fp32",
        dtype_error={},
        threads=1,
        attention="none",
        plan=plan,
        corpus={"name": corpus.name, "digest": corpus.digest, "num_utterances": len(corpus)},
        num_dropped=0,
        store={"root": "random", "path": "random"},
        object_list=[],
        totals={},
        versions={},
        format_2=Format2(ObjectList.of({}, where="random"), ()),
    )
