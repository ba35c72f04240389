"""`python -m pipelines bench load`: the training loader against its upper bound, and a training run that it feeds.

`options.LoadOptions` describes the variants. Files are in the system's cache. The store holds noise in three layers:
reading it costs the same as reading hidden states.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from extract.base.files import write_json
from extract.base.malloc import configure_memory
from extract.base.timing import TimedSteps
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import make_store, progress_of
from extract.shards import Extraction
from extract.store.manifest import KEEP
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from pipelines.bench import synthetic
from pipelines.bench.free import HOP_SAMPLES, FreeRunner, FreeUpstream
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, Named, over_rounds
from pipelines.bench.options import CeilingOptions, LoadOptions
from train.config import read_student

if TYPE_CHECKING:
    from train.data import DistillationData

Load = Bench[LoadOptions]
Loaded = Bench[LoadOptions | CeilingOptions]
LENGTHS = synthetic.LENGTHS["long"]
_LAYERS = (1, 2, 3)
_EPOCHS = 8  # of a few packs, which alone take too little time for a clock
_STEM_DIM = 512  # channels of wav2vec 2.0's stem


def prepare(bench: Load) -> dict[str, dict[str, Any]]:
    """Write corpus, store, flat file and .npy files; return the mean audio and bytes of a pack."""
    facts = prepare_store(bench, dim=bench.options.dim)
    store = StoreReader.open(bench.manifest)
    for index in range(store.num_utterances):
        np.save(bench.folder / f"{index}.npy", store.hidden_at(index).astype(np.float16))
    return {"": facts}


def prepare_store(bench: Loaded, *, dim: int, stored: bool = False) -> dict[str, Any]:
    """Write a corpus, a store of noise and a flat file of what training reads; return the mean of a pack.

    stored: the stem's output is kept and read in place of waveforms.
    """
    options = bench.options
    seconds = options.packs * options.pack_frames * HOP_SAMPLES / SAMPLE_RATE_HZ
    synthetic.make_noise(bench.corpus, LENGTHS, seconds=seconds)
    config = bench.extract_config(
        upstream=str(synthetic.DEMO_TEACHER), layers=_LAYERS, keep=KEEP if stored else KEEP - {"stem"}
    )
    card, corpus = find_upstream(config.upstream), Corpus.open(bench.corpus)
    upstream = FreeUpstream(
        num_layers=max(_LAYERS) + 1, dim=dim, longest=LENGTHS.longest_frames, stem_dim=_STEM_DIM if stored else None
    )
    extraction = Extraction.open(config, card, corpus, upstream.spec)
    runner = FreeRunner(config, upstream, card)
    write_json(bench.manifest, make_store(extraction, runner, progress_of(card, [corpus])).to_dict())
    num_bytes, audio_s = [], float(corpus.num_samples.sum()) / SAMPLE_RATE_HZ
    with _flat(bench).open("wb") as file:
        for parts in _bytes_of_packs(bench, stored=stored):
            num_bytes.append([part.nbytes for part in parts])
            for part in parts:
                file.write(part.tobytes())
    np.save(_sizes(bench), np.array(num_bytes))
    codes, scales, samples = np.mean(num_bytes, axis=0).tolist()
    pack_bytes = {"bytes": codes + scales + samples, "codes": codes, "scales": scales, "samples": samples}
    return {"number": len(num_bytes), "audio_s": audio_s / len(num_bytes), **pack_bytes}


def _flat(bench: Loaded) -> Path:
    return bench.corpus.with_suffix(".flat.bin")


def _sizes(bench: Loaded) -> Path:
    return bench.corpus.with_suffix(".sizes.npy")


def _data(bench: Loaded, *, stored: bool = False) -> "DistillationData":
    from train.data import DistillationData

    corpus = Corpus.open(bench.corpus)
    store = StoreReader.open(bench.manifest, corpus)
    return DistillationData(
        corpus,
        store,
        layers=_LAYERS,
        train_splits=("all",),
        dev_split=None,
        seed=0,
        stored_draws=math.inf if stored else 0,
    )


def epoch(data: "DistillationData") -> list[int]:
    """Return the packs of one epoch, in the order of training."""
    return list(islice(data.sampler.from_position(0), len(data.sampler)))


def _bytes_of_packs(bench: Loaded, *, stored: bool) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield the bytes that training reads of every pack: codes and scales of its utterances, samples (int16).

    stored: codes and scales of the stem's output follow those of the layers, and there are no samples.
    """
    data = _data(bench)
    for number in epoch(data):
        pack = data.store.pack(number, _LAYERS)
        # Rows of the codes of the pack's utterances.
        own = data.codec.code_rows(0, int(pack.first_frame[-1] + pack.num_frames[-1]))
        codes, scales = [pack.codes_LRW[:, own]], [pack.scale]
        if stored:
            codes_1FW, scale = data.store.stem_pack(number)
            codes, scales = [*codes, codes_1FW[:, own]], [*scales, scale]
        samples = [] if stored else [data.corpus.samples(int(index)) for index in pack.utterances]
        yield _as_bytes(codes), _as_bytes(scales), _as_bytes(samples)


def _as_bytes(arrays: Sequence[NDArray[Any] | None]) -> NDArray[np.uint8]:
    """Return the bytes of arrays end to end, uint8 (bytes,); None has none."""
    flat = [np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in arrays if one is not None]
    return np.concatenate([np.zeros(0, dtype=np.uint8), *flat])


def _spans(bench: Loaded) -> list[tuple[int, int]]:
    """Return the first byte of each pack in the flat file, and the byte after its last one."""
    stops = np.cumsum(np.load(_sizes(bench)).sum(axis=1)).tolist()
    return list(pairwise([0, *stops]))


def memmap(bench: Loaded) -> TimedSteps:
    """Copy the bytes of the packs out of a memory map."""
    configure_memory()  # as the command does, and for its upper bound too
    flat, spans = np.memmap(_flat(bench), dtype=np.uint8, mode="r"), _spans(bench)
    np.array(flat[slice(*spans[0])])  # warm-up: the first pages are mapped
    yield
    read = sum(np.array(flat[slice(*span)]).nbytes for span in spans * _EPOCHS)  # np.array copies
    yield
    return {"bytes": read, "packs": len(spans) * _EPOCHS, "work": read}


def preadv(bench: Loaded) -> TimedSteps:
    """Read the bytes of the packs into one buffer, by a system call each."""
    spans = _spans(bench)
    buffer, read = np.zeros(max(stop - start for start, stop in spans), dtype=np.uint8).data, 0
    with _flat(bench).open("rb") as file:
        yield
        for start, stop in spans * _EPOCHS:
            read += os.preadv(file.fileno(), [buffer[: stop - start]], start)
        yield
    return {"bytes": read, "packs": len(spans) * _EPOCHS, "work": read}


def loader(bench: Loaded, *, stored: bool = False) -> TimedSteps:
    """Read the batches of some epochs as training does, for a model of zero cost."""
    configure_memory()
    data, used = _data(bench, stored=stored), 0
    epoch_packs = len(data.sampler)
    with closing(data.training_batches(0)) as batches:
        for _ in range(epoch_packs):  # warm-up: files are open, indices are read, every shape of batch has its memory
            next(batches)
    batches = data.training_batches(epoch_packs)  # reading ahead starts with the clock
    yield
    for parts in islice(batches, epoch_packs * _EPOCHS):
        used += sum(len(part.utterances) for part in parts)
    yield
    batches.close()
    assert used == data.store.num_utterances * _EPOCHS  # an epoch has every utterance once
    # Own frames only: a pack's unused rows count for no variant. Samples are stored as int16.
    read = int(np.load(_sizes(bench)).sum()) * _EPOCHS
    return {"bytes": read, "packs": epoch_packs * _EPOCHS, "work": read}


def files(bench: Load) -> TimedSteps:
    """Read the same packs from one file an utterance: the layers end to end, and the waveforms."""
    configure_memory()
    data = _data(bench)
    packs = [data.store.utterances_of(pack).tolist() for pack in epoch(data)]

    def read(utterances: list[int]) -> int:
        hidden_LFD = np.concatenate([np.load(bench.folder / f"{index}.npy") for index in utterances], axis=1)
        # float16 layers (L, F, D), and waveforms at the corpus's 2 bytes a sample
        return hidden_LFD.nbytes + sum(2 * len(data.corpus.waveform(index)) for index in utterances)

    read(packs[0])
    yield
    num_bytes = sum(map(read, packs))
    yield
    return {"bytes": num_bytes, "packs": len(packs)}


def training(bench: Load) -> TimedSteps:
    """Run `train run` over one epoch, one pack a step, from random weights and without a dev split."""
    from train.distributed import find_device
    from train.loop import train
    from train.run import TrainRequest

    configure_memory()
    asked = read_student(bench.options.config, bench.options.student)
    os.chdir(bench.folder)  # of the checkpoints
    config = replace(
        asked,
        steps=max(len(epoch(_data(bench))), 2),  # warm-up and decay need two
        targets=_LAYERS,
        init="random",  # the noise has no teacher with initial weights
        optimiser=replace(asked.optimiser, accumulate=1, stem_grad_scale=asked.optimiser.stem_grad_scale or 0.1),
        train_splits=("all",),
        dev_split=None,
    )
    with TemporaryDirectory(dir=bench.folder) as name:
        request = TrainRequest(
            student=bench.options.student,
            config=config,
            manifest=bench.manifest,
            corpus=bench.corpus,
            out=Path(name) / "student",
            run_folder=Path(name) / "run",
            device=find_device(bench.options.device),
        )
        yield
        metrics = train(request)
        yield
    return {
        "steps": config.steps,
        "seconds_per_step": metrics.seconds / config.steps,
        "loader_wait_share": metrics.loader_wait_share,
    }


seconds_per_pack = over_rounds(lambda group, run, clock: getattr(run, clock) / run.outcome["packs"])
_bytes_per_s = over_rounds(lambda group, run, clock: run.outcome["bytes"] / run.wall_s)


def _remarks(group: Group) -> Iterator[str]:
    pack = group.facts
    step, share = (
        group.range("train", lambda run, key=key: float(run.outcome[key]))  # type: ignore[misc]
        for key in ("seconds_per_step", "loader_wait_share")
    )
    ready = seconds_per_pack(group, "loader", "wall_s").median
    yield f"{pack['number']} packs of {pack['audio_s']:.0f} s of audio, {pack['bytes'] / 1e6:.1f} MB each, " + (
        f"{pack['codes'] / 1e6:.1f} MB of it codes"
    )
    yield (
        f"train run waits for the loader {share.median:.2%} of its time ({share.min:.2%} to {share.max:.2%}); a step "
        f"takes {step.median:.2f} s, so one reading thread would be enough for a student {step.median / ready:.0f} "
        "times as fast"
    )


BENCHMARK = Benchmark(
    name="load",
    title="Loading",
    prepare=prepare,
    variants={"memmap": memmap, "preadv": preadv, "loader": loader, "files": files, "train": training},
    rows=("memmap", "preadv", "loader", "files"),
    figures=(
        Figure(
            key="sseconds_per_pack",
            title="ms a pack",
            text="{:.1f}",
            of=seconds_per_pack,
            clocks=BOTH,
            scale=1e3,
            ranged=True,
        ),
        Figure(key="bytes_per_s", title="MB / s", text="{:,.0f}", of=_bytes_per_s, scale=1e-6),
    ),
    subject=Named("loader", "the loader"),
    limit=Named("memmap", "a memory map"),
    baseline=Named("files", "one file an utterance"),
    remarks=_remarks,
    sizes={
        "tiny": "--threads 1 --packs 2 --dim 160 --pack-frames 800 --rounds 1",
        "small": "--threads 1 --packs 4 --rounds 3",
        "base": "--threads 1 --packs 8 --rounds 3",
    },
)
