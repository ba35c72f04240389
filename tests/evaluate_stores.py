"""Tiny real corpora and stores for the tests of `evaluate`: written by the real writers, hidden states by hand.

Shapes: U utterances, L layers, T frames of one utterance, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from evaluate.checkpoint import TaskSession
from evaluate.jobs import ScoringJob, measure
from evaluate.scorefile import ScoreFile
from evaluate.tasks import TASKS
from extract.base.progress import ProgressBar
from extract.corpus import Corpus
from extract.corpus_writer import Utterance, write_corpus
from extract.store.codecs import codec_named
from extract.store.manifest import FORMAT_VERSION, Manifest
from extract.store.packing import Packing, pack_utterances
from extract.store.transform import Transform
from extract.store.transform_fit import fitted_to
from extract.store.writer import StoreWriter

HOP_SAMPLES, RECEPTIVE_SAMPLES = 320, 400
Hidden = Callable[[int, int], NDArray[np.float32]]  # corpus index, frames -> (L, T, D)


def score_task(task: str, manifest: Path, corpus: Path, recipe: dict[str, Any], *, device: str = "cpu") -> ScoreFile:
    """Score a task without writing anything; its progress must add up to the recipe's amount."""
    parsed = TASKS[task].parse_recipe(recipe, where="test")
    job = ScoringJob(
        task=TASKS[task],
        recipe=parsed,
        upstream="hand",
        manifest=manifest,
        corpus=corpus,
        out=Path(),
        device=device,
    )
    bar = ProgressBar(task, total=parsed.amount, unit="steps")
    score = measure(job, job.open(), TaskSession(bar))
    assert bar.done == pytest.approx(parsed.amount)
    return score


def without_seconds(score: ScoreFile) -> ScoreFile:
    """Return a score without its wall clock."""
    return replace(score, seconds=0.0)


def make_corpus(
    folder: Path,
    *,
    labels: dict[str, Sequence[str]],
    splits: Sequence[str],
    num_frames: Sequence[int],
    speakers: Sequence[str] | None = None,
    name: str = "tiny",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a corpus of quiet noise; utterance u has `num_frames[u]` frames. Return its card."""
    generator = np.random.default_rng(len(splits))
    utterances = [
        Utterance(
            f"utt{index:04d}",
            generator.integers(-9, 9, RECEPTIVE_SAMPLES + HOP_SAMPLES * (frames - 1)).astype(np.int16),
            split,
            speakers[index] if speakers else f"s{index % 3}",
            {label: values[index] for label, values in labels.items()},
        )
        for index, (split, frames) in enumerate(zip(splits, num_frames, strict=True))
    ]
    write_corpus(folder / f"{name}.h5", name=name, reader="folder", utterances=utterances, metadata=metadata)
    return folder / f"{name}.json"


def make_store(
    folder: Path,
    corpus_card: Path,
    hidden: Hidden,
    *,
    keep: Sequence[str] = ("frames", "pooled"),
    codec: str = "float16",
    pack_frames: int = 128,
    drop_long: bool = False,
    stem: Hidden | None = None,
) -> Path:
    """Write a finished store of `corpus_card` with the hidden states of `hidden`. Return its manifest.

    stem: the stem's output, as of one layer. A codec with a fit is fitted to all packs.
    """
    corpus = Corpus.open(corpus_card)
    num_frames = (corpus.num_samples - RECEPTIVE_SAMPLES) // HOP_SAMPLES + 1
    packing = pack_utterances(
        num_frames,
        ids=corpus.ids,
        pack_frames=pack_frames,
        shard_packs=2,
        align=codec_named(codec).block_frames,
        drop_long=drop_long,
    )
    num_layers, _, dim = hidden(0, int(num_frames[0])).shape
    location = folder / "stores" / "hand" / corpus.name
    stem_dim = None if stem is None else stem(0, int(num_frames[0])).shape[2]
    writer = StoreWriter(
        location, packing, tuple(range(num_layers)), dim, codec, frozenset(keep), stem_dim=stem_dim, ids=corpus.ids
    )
    writer.create()

    def states(values: Hidden, pack: int) -> NDArray[np.float32]:
        """Return the values of a pack's utterances end to end, as an upstream does."""
        own_LFD = np.concatenate(
            [values(int(index), int(num_frames[index])) for index in packing.by_pack[pack]], axis=1
        )
        return np.pad(own_LFD, ((0, 0), (0, pack_frames - own_LFD.shape[1]), (0, 0)))

    if writer.needs_parameters:
        parameters = {}
        for array in writer.coded:
            assert isinstance(array.codec, Transform)
            values = hidden if array.codes == "hidden" or stem is None else stem
            sample = [states(values, pack)[:, packing.spread(pack)] for pack in range(packing.num_packs)]
            parameters[array.codes] = fitted_to(array.codec, np.concatenate(sample, axis=1)).parameters
        writer = replace(writer, parameters=writer.write_parameters(parameters))
    for shard in range(packing.num_shards):
        packs = [
            writer.encode_pack(pack, states(hidden, pack), None if stem is None else states(stem, pack)[0])
            for pack in packing.packs_of(shard)
        ]
        writer.write_shard(shard, packs)
    manifest = _manifest(folder, corpus, packing, dim=dim, layers=writer.layers, codec=codec, keep=keep)
    writer.finish(manifest, ids=corpus.ids)
    return location / "manifest.json"


def smooth(index: int, num_frames: int) -> NDArray[np.float32]:
    """Return hidden states of 3 layers of 8 correlated features that change slowly, float32 (3, T, 8)."""
    generator = np.random.default_rng(index)
    slow_LTD = lfilter([1], [1, -0.9], generator.standard_normal((3, num_frames, 8)), axis=1)
    mixed_LTD = slow_LTD @ np.random.default_rng(99).standard_normal((3, 8, 8)) + np.arange(8)
    return mixed_LTD.astype(np.float32)


def _manifest(
    folder: Path,
    corpus: Corpus,
    packing: Packing,
    *,
    dim: int,
    layers: tuple[int, ...],
    codec: str,
    keep: Sequence[str],
) -> Manifest:
    """Return the manifest of a store whose upstream is the test itself."""
    return Manifest(
        format_version=FORMAT_VERSION,
        complete=False,
        fingerprint="f" * 64,
        digest="",
        upstream={
            "id": "hand",
            "name": "hand",
            "num_parameters": 0,
            "note": None,
            "weights_sha256": "",
            "normalise": False,
        },
        layers=layers,
        dim=dim,
        convention="by hand",
        hop_samples=HOP_SAMPLES,
        receptive_samples=RECEPTIVE_SAMPLES,
        keep=tuple(sorted(keep)),
        codec=codec,
        codec_error={},
        dtype="fp32",
        dtype_error={},
        threads=1,
        attention="none",
        plan=packing.summary(),
        corpus={"name": corpus.name, "digest": corpus.digest, "num_utterances": len(corpus)},
        num_dropped=int(np.count_nonzero(packing.pack < 0)),
        store={"root": (folder / "stores").as_posix(), "path": f"hand/{corpus.name}"},
        object_list=[],
        totals={},
        versions={},
    )


def class_corpus(folder: Path, *, num: int = 60, seed: int = 0, noise: float = 0.3) -> tuple[Path, Hidden]:
    """Keywords in three classes; the time mean of layer 1 of three is the class, the others are noise."""
    words = [("yes", "no", "up")[index % 3] for index in range(num)]
    splits = [("train", "train", "train", "dev", "test")[index // 3 % 5] for index in range(num)]
    num_frames = [5 + index * 7 % 20 for index in range(num)]
    card = make_corpus(folder, labels={"keyword": words}, splits=splits, num_frames=num_frames)
    means = np.random.default_rng(seed).normal(size=(3, 8))

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states = np.random.default_rng([seed, index]).normal(size=(3, frames, 8)) * noise
        states[1] += means[index % 3]
        return states.astype(np.float32)

    return card, hidden


def phone_corpus(folder: Path, *, num: int = 50, seed: int = 0, noise: float = 0.3) -> tuple[Path, Hidden]:
    """Transcripts over four phones, and as text; layer 0 of two encodes the phone of each frame, layer 1 is noise."""
    generator = np.random.default_rng(seed)
    phones = ["AA1", "B", "K", "S"]
    spoken = [generator.integers(0, 4, generator.integers(2, 5)) for _ in range(num)]
    splits = [("train", "train", "train", "dev", "test")[index % 5] for index in range(num)]
    transcripts = [" ".join(phones[symbol] for symbol in transcript) for transcript in spoken]
    texts = [" ".join(["ab", "cd", "ef", "gh"][symbol] for symbol in transcript) for transcript in spoken]
    card = make_corpus(
        folder,
        labels={"phones": transcripts, "text": texts},
        splits=splits,
        num_frames=[8 * len(transcript) + 3 for transcript in spoken],
    )
    means = np.random.default_rng(seed).normal(size=(5, 12)) * 2

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states = np.random.default_rng([seed, index]).normal(size=(2, frames, 12)) * [[[0.3]], [[noise]]]
        # Five frames of the phone, three of silence; silence at the end.
        per_frame = np.full(frames, 4)
        for place, symbol in enumerate(spoken[index]):
            per_frame[8 * place : 8 * place + 5] = symbol
        states[0] += means[per_frame]
        return states.astype(np.float32)

    return card, hidden
