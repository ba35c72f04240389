"""`python -m pipelines bench load`: the loader, its limit, and a training run that it feeds.

    memmap    the limit: the same bytes, pack by pack in one flat file, copied out of a numpy memory map
    loader    the batches of training, ready for the device: codes and scales from Zarr, waveforms from HDF5, padded
    files     what people do today: of every utterance its layers, float16, from an .npy file of its own
    train     `train run` over the same packs: what share of its time it waits for the loader

They take turns in every round (measure.py), with the files in the system's cache. The store is of Base's size, with
noise in place of hidden states: reading costs the same.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.base.files import write_json
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import CLOCKS, Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import make_store
from extract.shards import Extraction, LocalRunner
from extract.store.codec import CODECS
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.spec import UpstreamFacts, UpstreamSpec
from pipelines.bench import material
from pipelines.bench.measure import by_clocks, check_asked, headed
from train.config import read_student

if TYPE_CHECKING:
    from rich.table import Table

    from train.data import DistillationData

_LAYERS = (4, 8, 12)
_HOP_SAMPLES, _RECEPTIVE_SAMPLES = 320, 400


@dataclass(frozen=True, kw_only=True)
class LoadBench:
    """What `bench load` was asked for."""

    params: Path
    student: str
    packs: int
    dim: int
    codec: str
    pack_frames: int
    rounds: int
    device: str
    threads: int | None

    def __post_init__(self) -> None:
        check_asked(self, "packs", "dim", "rounds", "pack_frames")
        CODECS[self.codec].width(self.dim)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a contender finds everything."""

    bench: LoadBench
    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "long.h5"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def flat(self) -> Path:
        return self.folder / "flat.bin"


def run_bench(bench: LoadBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    read_student(bench.params, bench.student)  # a wrong name is told before anything is made
    head = headed("load", asdict(bench) | {"params": bench.params.as_posix()})
    with TemporaryDirectory(prefix="retort-bench-") as name:
        place = Place(bench=replace(bench, params=bench.params.resolve()), folder=Path(name))
        progress(f"making {bench.packs} packs of {bench.codec}")
        packs = in_fresh_process(make_material, place)
        runs = run_interleaved(CONTENDERS, place, rounds=bench.rounds, threads=bench.threads, progress=progress)
    assert len({run.outcome["bytes"] for run in runs if run.variant in ("memmap", "loader")}) == 1, "not the same bytes"
    return head | {
        "packs": packs,
        **summarise(runs),
        "runs": [asdict(run) for run in runs],
    }


def make_material(place: Place) -> dict[str, Any]:
    """Write corpus, store and flat file; return how much of everything a pack holds."""
    bench = place.bench
    seconds = bench.packs * bench.pack_frames * _HOP_SAMPLES / SAMPLE_RATE_HZ
    material.make_noise(place.corpus, material.LENGTHS["long"], seconds=seconds)
    corpus = Corpus.open(place.corpus)
    settings = ExtractConfig(
        upstream=str(material.DEMO_TEACHER),
        corpus=place.corpus,
        manifest=place.manifest,
        store=place.folder,
        layers=_LAYERS,
        codec=bench.codec,
        pack_frames=bench.pack_frames,
    )
    card = find_upstream(settings.upstream)
    shape = UpstreamSpec(max(_LAYERS) + 1, bench.dim, _HOP_SAMPLES, _RECEPTIVE_SAMPLES, stem_dim=None)
    manifest = make_store(Extraction.open(settings, card, corpus, shape), _Noise(settings, card))
    write_json(place.manifest, manifest.to_dict())
    audio_s, num_bytes = 0.0, []
    with place.flat.open("wb") as file:
        for parts in _bytes_of_packs(place):
            num_bytes.append([part.nbytes for part in parts])
            audio_s += parts[-1].nbytes / 2 / SAMPLE_RATE_HZ
            for part in parts:
                file.write(part.tobytes())
    np.save(place.folder / "bytes.npy", np.array(num_bytes))
    store = StoreReader.open(place.manifest)
    for index in range(len(corpus)):
        np.save(place.folder / f"{index}.npy", store.hidden_at(index).astype(np.float16))
    codes, scales, samples = np.mean(num_bytes, axis=0).tolist()
    return {"number": len(num_bytes), "audio_s": audio_s / len(num_bytes), "bytes": codes + scales + samples,
            "codes": codes, "scales": scales, "samples": samples}  # fmt: skip


class _Noise(LocalRunner):
    """A runner that writes noise in place of a teacher's hidden states."""

    def open(self, extraction: Extraction) -> UpstreamFacts:
        return UpstreamFacts(convention="noise", attention="none", num_parameters=0, threads=1, dtype_error={})

    def write(self, extraction: Extraction, shards: list[int], advance: Callable[[float], None]) -> None:
        writer, plan = extraction.writer, extraction.writer.packing
        shape = (len(_LAYERS), plan.pack_frames, writer.dim)
        noise_LFD = np.random.default_rng(material.SEED).standard_normal(shape, dtype=np.float32)
        for shard in shards:
            encoded = []
            for pack in plan.packs_of(shard):
                hidden_LFD, last = noise_LFD.copy(), plan.by_pack[pack][-1]
                hidden_LFD[:, plan.first_frame[last] + plan.num_frames[last] :] = 0
                encoded.append(writer.encode_pack(pack, hidden_LFD))
            writer.write_shard(shard, encoded)


def _data(place: Place) -> "DistillationData":
    from train.data import DistillationData

    corpus = Corpus.open(place.corpus)
    store = StoreReader.open(place.manifest, corpus)
    return DistillationData(corpus, store, layers=_LAYERS, train_splits=("all",), dev_split=None, seed=0)


def _order(data: "DistillationData") -> list[int]:
    """The packs of one epoch, in the order of training."""
    return list(islice(data.sampler.from_position(0), len(data.sampler)))


def _bytes_of_packs(place: Place) -> Iterator[tuple[Any, Any, Any]]:
    """Of every pack what a batch is made of: the frames' codes, the scales, the samples."""
    data = _data(place)
    for pack in _order(data):
        batch = data.training_batch(pack)
        scale = np.zeros(0) if batch.scale is None else batch.scale.numpy()
        samples = np.concatenate([data.corpus.samples(index) for index in batch.utterances])
        yield batch.codes_LFW.numpy(), scale, samples


# The contenders: each in a process of its own.


def memmap(place: Place) -> TimedSteps:
    """Copies of the packs' bytes, out of a memory map."""
    keep_freed_blocks()  # as the command does, and for its limit too
    flat = np.memmap(place.flat, dtype=np.uint8, mode="r")
    stops = np.cumsum(np.load(place.folder / "bytes.npy").sum(axis=1)).tolist()
    starts = [0, *stops[:-1]]
    np.array(flat[: stops[0]])
    yield
    read = 0
    for start, stop in zip(starts, stops, strict=True):
        read += np.array(flat[start:stop]).nbytes
    yield
    return {"bytes": read, "packs": len(stops)}


def loader(place: Place) -> TimedSteps:
    """The batches of one epoch, one after another."""
    keep_freed_blocks()
    data = _data(place)
    order = _order(data)
    data.training_batch(order[0])
    yield
    frames = samples = 0
    for pack in order:
        batch = data.training_batch(pack)
        frames += len(batch.rows_F)
        samples += int(batch.num_samples_B.sum())
    yield
    per_frame = len(_LAYERS) * batch.codes_LFW.shape[-1] * batch.codes_LFW.element_size()
    scales = 0 if batch.scale is None else batch.scale.numel() * batch.scale.element_size() * len(order)
    return {"bytes": frames * per_frame + scales + 2 * samples, "packs": len(order)}


def training(place: Place) -> TimedSteps:
    """`train run` over one epoch, one pack a step. There is no teacher to start from and no dev split to score."""
    from train.loop import train
    from train.run import TrainRequest, find_device

    keep_freed_blocks()
    os.chdir(place.folder)  # checkpoints
    asked = read_student(place.bench.params, place.bench.student)
    config = replace(
        asked,
        steps=max(len(_order(_data(place))), 2),
        targets=_LAYERS,
        init="random",
        optimiser=replace(asked.optimiser, accumulate=1, stem_grad_scale=asked.optimiser.stem_grad_scale or 0.1),
        train_splits=("all",),
        dev_split=None,
    )
    with TemporaryDirectory(dir=place.folder) as name:
        request = TrainRequest(
            student=place.bench.student,
            config=config,
            manifest=place.manifest,
            corpus=place.corpus,
            out=Path(name) / "student",
            run_folder=Path(name) / "run",
            device=find_device(place.bench.device),
        )
        yield
        metrics = train(request)
        yield
    return {
        "steps": config.steps,
        "seconds_per_step": metrics.seconds / config.steps,
        "loader_wait_share": metrics.loader_wait_share,
    }


def files(place: Place) -> TimedSteps:
    """The same packs, from one file an utterance: the layers end to end, and the waveforms."""
    keep_freed_blocks()
    data = _data(place)
    packs = [data.store.utterances_of(pack).tolist() for pack in _order(data)]

    def read(utterances: list[int]) -> int:
        hidden_LFD = np.concatenate([np.load(place.folder / f"{index}.npy") for index in utterances], axis=1)
        return hidden_LFD.nbytes + sum(2 * len(data.corpus.waveform(index)) for index in utterances)

    read(packs[0])
    yield
    num_bytes = sum(map(read, packs))
    yield
    return {"bytes": num_bytes, "packs": len(packs)}


CONTENDERS: dict[str, Callable[[Place], TimedSteps]] = {
    "memmap": memmap,
    "loader": loader,
    "files": files,
    "train": training,
}


def summarise(runs: Sequence[TimedRun]) -> dict[str, Any]:
    """Of the raw figures: rates, ratios and shares, each as the median, least and most of the rounds."""
    reading = {
        name: {
            "seconds_per_pack": asdict(range_of(runs, name, lambda run: run.wall_s / run.outcome["packs"])),
            "cpu_s_per_pack": asdict(range_of(runs, name, lambda run: run.cpu_s / run.outcome["packs"])),
            "bytes_per_s": asdict(range_of(runs, name, lambda run: run.outcome["bytes"] / run.wall_s)),
            "peak_bytes": asdict(range_of(runs, name, lambda run: run.peak_bytes)),
        }
        for name in ("memmap", "loader", "files")
    }
    return {
        "contenders": reading,
        "times_as_fast": {f"{name}/memmap": by_clocks(runs, name, "memmap") for name in ("loader", "files")},
        "train": {
            figure: asdict(range_of(runs, "train", lambda run, figure=figure: run.outcome[figure]))  # type: ignore[misc]
            for figure in ("seconds_per_step", "loader_wait_share")
        },
    }


def table_of(result: dict[str, Any]) -> "Table":
    """The two ways of reading, for the terminal."""
    from rich.table import Table

    packs = result["packs"]
    of = f"{packs['number']} packs of {packs['audio_s']:.0f} s of audio"
    size = f"{packs['bytes'] / 1e6:.1f} MB each, {packs['codes'] / 1e6:.1f} MB of it codes"
    table = Table(title=f"{of}: {size}", title_justify="left")
    table.add_column("")
    for heading in ("ms a pack", "CPU ms a pack", "MB / s", "as fast as memmap", "by CPU time", "peak memory"):
        table.add_column(heading, justify="right")
    for name, figures in result["contenders"].items():
        pack, cpu, rate = figures["seconds_per_pack"], figures["cpu_s_per_pack"], figures["bytes_per_s"]
        ratios = result["times_as_fast"].get(f"{name}/memmap")
        table.add_row(
            name,
            f"{pack['median'] * 1e3:.1f} ({pack['min'] * 1e3:.1f}–{pack['max'] * 1e3:.1f})",
            f"{cpu['median'] * 1e3:.1f}",
            f"{rate['median'] / 1e6:,.0f}",
            *(f"{ratios[clock]['median']:.1%}" if ratios else "" for clock in CLOCKS),
            f"{figures['peak_bytes']['median'] / 2**20:,.0f} MiB",
        )
    return table


def verdict(result: dict[str, Any]) -> str:
    """Whether training ever waits."""
    step, share = result["train"]["seconds_per_step"], result["train"]["loader_wait_share"]
    ready = result["contenders"]["loader"]["seconds_per_pack"]["median"]
    return (
        f"train run waits for the loader {share['median']:.2%} of its time ({share['min']:.2%} to {share['max']:.2%}); "
        f"a step takes {step['median']:.2f} s, so a student could be {step['median'] / ready:.0f} times as fast "
        "before one reading thread held it up"
    )


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """The table, then the verdict."""
    return [table_of(result), verdict(result)]
