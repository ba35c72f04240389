"""`python -m pipelines bench load`: the training loader against its upper bound, and a training run that it feeds.

`options.LoadOptions` describes the variants. Files are in the system's cache. The store holds noise in three layers:
reading it costs the same as reading hidden states.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.base.files import write_json
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import TimedSteps
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import make_store, progress_of
from extract.shards import Advance, Extraction, LocalRunner
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.spec import UpstreamFacts, UpstreamSpec
from pipelines.bench import synthetic
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, Named, over_rounds
from pipelines.bench.options import LoadOptions
from train.config import read_student

if TYPE_CHECKING:
    from train.data import DistillationData

Load = Bench[LoadOptions]
_LAYERS = (4, 8, 12)  # three of HuBERT Base, as in the study hubert-base-ls960
_HOP_SAMPLES, _RECEPTIVE_SAMPLES = 320, 400  # of wav2vec 2.0's stem


def prepare(bench: Load) -> dict[str, dict[str, Any]]:
    """Write corpus, store, flat file and .npy files; return the mean audio and bytes of a pack."""
    options = bench.options
    seconds = options.packs * options.pack_frames * _HOP_SAMPLES / SAMPLE_RATE_HZ
    synthetic.make_noise(bench.corpus, synthetic.LENGTHS["long"], seconds=seconds)
    config = bench.extract_config(upstream=str(synthetic.DEMO_TEACHER), layers=_LAYERS)
    card, corpus = find_upstream(config.upstream), Corpus.open(bench.corpus)
    shape = UpstreamSpec(max(_LAYERS) + 1, options.dim, _HOP_SAMPLES, _RECEPTIVE_SAMPLES, stem_dim=None)
    extraction = Extraction.open(config, card, corpus, shape)
    manifest = make_store(extraction, _NoiseRunner(config, card), progress_of(card, [corpus]))
    write_json(bench.manifest, manifest.to_dict())
    audio_s, num_bytes = 0.0, []
    with _flat(bench).open("wb") as file:
        for parts in _bytes_of_packs(bench):
            num_bytes.append([part.nbytes for part in parts])
            audio_s += parts[-1].nbytes / 2 / SAMPLE_RATE_HZ  # samples are int16
            for part in parts:
                file.write(part.tobytes())
    np.save(bench.folder / "bytes.npy", np.array(num_bytes))
    store = StoreReader.open(bench.manifest)
    for index in range(len(corpus)):
        np.save(bench.folder / f"{index}.npy", store.hidden_at(index).astype(np.float16))
    codes, scales, samples = np.mean(num_bytes, axis=0).tolist()
    pack_bytes = {"bytes": codes + scales + samples, "codes": codes, "scales": scales, "samples": samples}
    return {"": {"number": len(num_bytes), "audio_s": audio_s / len(num_bytes), **pack_bytes}}


def _flat(bench: Load) -> Path:
    return bench.folder / "flat.bin"


class _NoiseRunner(LocalRunner):
    """A runner that writes noise in place of hidden states."""

    def open(self, extraction: Extraction) -> UpstreamFacts:
        return UpstreamFacts(convention="noise", attention="none", num_parameters=0, threads=1, dtype_error={})

    def write(self, extraction: Extraction, shards: list[int], advance: Advance) -> None:
        writer, packing = extraction.writer, extraction.writer.packing
        shape = (len(_LAYERS), packing.pack_frames, writer.dim)
        noise_LFD = np.random.default_rng(synthetic.SEED).standard_normal(shape, dtype=np.float32)
        for shard in shards:
            encoded = []
            for pack in packing.packs_of(shard):
                hidden_LFD, last = noise_LFD.copy(), packing.by_pack[pack][-1]
                hidden_LFD[:, packing.first_frame[last] + packing.num_frames[last] :] = 0  # rows past the last frame
                encoded.append(writer.encode_pack(pack, hidden_LFD))
            writer.write_shard(shard, encoded)


def _data(bench: Load) -> "DistillationData":
    from train.data import DistillationData

    corpus = Corpus.open(bench.corpus)
    store = StoreReader.open(bench.manifest, corpus)
    return DistillationData(corpus, store, layers=_LAYERS, train_splits=("all",), dev_split=None, seed=0)


def epoch(data: "DistillationData") -> list[int]:
    """Return the packs of one epoch, in the order of training."""
    return list(islice(data.sampler.from_position(0), len(data.sampler)))


def _bytes_of_packs(bench: Load) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the parts of every pack's batch: codes of the frames (L, F, W), scales, samples (int16)."""
    data = _data(bench)
    for pack in epoch(data):
        [batch] = data.training_parts(pack)
        scale = np.zeros(0) if batch.scale is None else batch.scale.numpy()
        samples = np.concatenate([data.corpus.samples(index) for index in batch.utterances])
        yield batch.codes_LFW.numpy(), scale, samples


def memmap(bench: Load) -> TimedSteps:
    """Copy the bytes of the packs out of a memory map."""
    keep_freed_blocks()  # as the command does, and for its upper bound too
    flat = np.memmap(_flat(bench), dtype=np.uint8, mode="r")
    stops = np.cumsum(np.load(bench.folder / "bytes.npy").sum(axis=1)).tolist()
    starts = [0, *stops[:-1]]
    np.array(flat[: stops[0]])  # warm-up: the first pages are mapped
    yield
    read = 0
    for start, stop in zip(starts, stops, strict=True):
        read += np.array(flat[start:stop]).nbytes  # np.array copies
    yield
    return {"bytes": read, "packs": len(stops), "work": read}


def loader(bench: Load) -> TimedSteps:
    """Read the batches of one epoch, one after another."""
    keep_freed_blocks()
    data = _data(bench)
    order = epoch(data)
    data.training_parts(order[0])  # warm-up: files are open, indices are read
    yield
    frames = samples = 0
    for pack in order:
        [batch] = data.training_parts(pack)
        frames += len(batch.rows_F)
        samples += int(batch.num_samples_B.sum())
    yield
    per_frame = len(_LAYERS) * batch.codes_LFW.shape[-1] * batch.codes_LFW.element_size()
    scales = 0 if batch.scale is None else batch.scale.numel() * batch.scale.element_size() * len(order)
    # Valid frames only: a pack's unused rows count for no variant. Samples are stored as int16.
    read = frames * per_frame + scales + 2 * samples
    return {"bytes": read, "packs": len(order), "work": read}


def files(bench: Load) -> TimedSteps:
    """Read the same packs from one file an utterance: the layers end to end, and the waveforms."""
    keep_freed_blocks()
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

    keep_freed_blocks()
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


_per_pack = over_rounds(lambda group, run, clock: getattr(run, clock) / run.outcome["packs"])
_bytes_per_s = over_rounds(lambda group, run, clock: run.outcome["bytes"] / run.wall_s)


def _remarks(group: Group) -> Iterator[str]:
    pack = group.facts
    step, share = (
        group.range("train", lambda run, key=key: float(run.outcome[key]))  # type: ignore[misc]
        for key in ("seconds_per_step", "loader_wait_share")
    )
    ready = _per_pack(group, "loader", "wall_s").median
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
    variants={"memmap": memmap, "loader": loader, "files": files, "train": training},
    rows=("memmap", "loader", "files"),
    figures=(
        Figure(key="s_per_pack", title="ms a pack", text="{:.1f}", of=_per_pack, clocks=BOTH, scale=1e3, ranged=True),
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
