"""`python -m pipelines bench utterances`: cost of every stage that handles utterances, at three numbers of them.

The sizes are 1/28, 1/4 and all of `--utterances`, by default those of 960 h of LibriSpeech. Utterances have 1 to 4
frames and packs are as small, so that packs, shards and objects are as many as with whole utterances. The upstream
has zero cost (free.py); all else is real, to the last fsync.

Each size runs in one process. CPU time is of all of its threads. Memory is the growth of the process's peak in a step.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import numpy as np

from extract.base.dask_pool import DaskPool
from extract.base.files import write_json
from extract.base.timing import TimedSteps, status_bytes
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import Utterance, write_corpus
from extract.run import make_store, progress_of
from extract.shards import Extraction
from extract.stats import measure
from extract.store.reader import StoreReader
from pipelines.bench.free import CARD, HOP_SAMPLES, RECEPTIVE_SAMPLES, FreeRunner, FreeUpstream
from pipelines.bench.measure import Bench, Benchmark, Figure, Group, over_rounds
from pipelines.bench.options import UtterancesOptions
from pipelines.bench.scaling import SIZE_NAMES, fit, size_of
from pipelines.bench.synthetic import NOISE, SEED

_SHARES = (28, 4, 1)  # of the utterances
_MOST_FRAMES = 4  # of an utterance
_DATASET_WORDS = 34  # mean length of a transcript of LibriSpeech
_STATS_PACKS = 100


def utterances(num: int) -> Iterator[Utterance]:
    """Yield short utterances of noise, nine tenths for training, with transcripts as long as LibriSpeech's."""
    noise = (
        np.random.default_rng(SEED).standard_normal(RECEPTIVE_SAMPLES + _MOST_FRAMES * HOP_SAMPLES) * 3_000
    ).astype(np.int16)
    for index in range(num):
        words = " ".join(f"word{(index + place) % 997}" for place in range(_DATASET_WORDS))
        yield Utterance(
            f"{index // 100:05d}-{index:08d}",
            noise[: RECEPTIVE_SAMPLES + index % _MOST_FRAMES * HOP_SAMPLES],
            split="train" if index < 0.9 * num else "test",
            speaker=f"speaker{index // 120}",
            labels={"text": words, "phones": words[::-1]},
        )


@dataclass
class Meter:
    """Cost of each step of a run, by name."""

    costs: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, pieces: int = 1) -> Iterator[None]:
        """Measure the body: CPU seconds for each of its pieces, and growth of the peak memory in bytes."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before, start = status_bytes("VmRSS"), time.process_time()
        yield
        self.costs[f"{name}_cpu_s"] = (time.process_time() - start) / pieces
        self.costs[f"{name}_bytes"] = status_bytes("VmHWM") - before

    @contextmanager
    def open_files(self, name: str) -> Iterator[None]:
        """Record the largest number of open file descriptors, looked up every 10 ms."""
        ended, found = Event(), [0]

        def watch() -> None:
            while not ended.wait(0.01):
                found.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208  # in a few microseconds

        thread = Thread(target=watch)
        thread.start()
        yield
        ended.set()
        thread.join()
        self.costs[name] = max(found)


def sizes(options: UtterancesOptions) -> list[int]:
    """Return the three numbers of utterances."""
    return [max(1, options.utterances // share) for share in _SHARES]


def prepare(bench: Bench[UtterancesOptions]) -> dict[str, dict[str, Any]]:
    """Return the sizes; each run writes its own corpus."""
    return {"": {"sizes": [size / 1000 for size in sizes(bench.options)]}}


def at_size(bench: Bench[UtterancesOptions], *, number: int) -> TimedSteps:
    """Write a corpus, make its store, and use both as the stages do."""
    import torch  # noqa: F401  # takes seconds that belong to no step

    num, meter = sizes(bench.options)[number], Meter()
    with TemporaryDirectory(dir=bench.folder) as name:
        config = ExtractConfig(
            upstream=CARD.id,
            corpus=Path(name) / "noise.json",
            manifest=Path(name) / "manifest.json",
            store=Path(name) / "stores",
            codec=bench.options.codec,
            pack_frames=bench.options.pack_frames,
        )
        yield
        _make_store(config, num, meter)
        reader, packs = _read_store(config, meter)
        with DaskPool(number=1, address=None, threads=1, piece="task") as pool, meter.step("task", packs):
            for _ in pool.each(abs, range(packs)):
                pass
        yield
        return meter.costs | {"packs": reader.num_packs, "manifest_bytes": config.manifest.stat().st_size}


def _make_store(config: ExtractConfig, num: int, meter: Meter) -> None:
    upstream = FreeUpstream(num_layers=3, dim=16, longest=_MOST_FRAMES)
    with meter.step("corpus_write"):
        write_corpus(config.corpus.with_suffix(".h5"), name="noise", reader=NOISE, utterances=utterances(num))
    with meter.step("corpus_open"):
        corpus = Corpus.open(config.corpus)
    with meter.step("pack"):
        extraction = Extraction.open(config, CARD, corpus, upstream.spec)
    shards = range(extraction.writer.packing.num_shards)
    runner = FreeRunner(config, upstream)
    extraction.writer.create()
    with meter.step("shard", len(shards)):
        for _ in runner.write(extraction, list(shards), lambda seconds: None):
            pass
    # All shards are finished: what is left is the check of their records, and `finish`.
    with meter.open_files("finish_files"), meter.step("finish"):
        bar = progress_of(CARD, [corpus])
        write_json(config.manifest, make_store(extraction, runner, bar).to_dict())


def _read_store(config: ExtractConfig, meter: Meter) -> tuple[StoreReader, int]:
    """Open and read the store; return its reader and the number of its shards."""
    corpus = Corpus.open(config.corpus)
    with meter.step("reader"):
        reader = StoreReader.open(config.manifest, corpus)
        reader.utterances_of(0)
    with meter.step("pooled"):
        reader.pooled(corpus.select("test"))
    packs = min(_STATS_PACKS, reader.num_packs)
    measure(reader, max_packs=1)  # imports
    with meter.step("stats", packs):
        measure(reader, max_packs=packs)
    return reader, reader.manifest.plan["num_shards"]


def _figure(key: str, title: str, scale: float = 1.0) -> Figure:
    return Figure(
        key=key,
        title=title,
        text="{:.3g}",
        of=over_rounds(lambda group, run, clock: float(run.outcome[key])),
        scale=scale,
    )


_MS, _MB = 1e3, 1e-6
_COSTS = (
    _figure("corpus_write_cpu_s", "corpus written, CPU s"),
    _figure("corpus_write_bytes", "MB", _MB),
    _figure("corpus_open_cpu_s", "opened, CPU s"),
    _figure("corpus_open_bytes", "MB", _MB),
    _figure("pack_cpu_s", "packed, CPU s"),
    _figure("shard_cpu_s", "a shard written, CPU ms", _MS),
    _figure("finish_cpu_s", "store finished, CPU s"),
    _figure("finish_bytes", "MB", _MB),
    _figure("finish_files", "open files"),
    _figure("manifest_bytes", "manifest, kB", 1e-3),
    _figure("reader_cpu_s", "store opened, CPU s"),
    _figure("pooled_cpu_s", "time means of a split, CPU s"),
    _figure("stats_cpu_s", "statistics of a pack, CPU ms", _MS),
    _figure("task_cpu_s", "a Dask task, CPU ms", _MS),
)


def _exponents(group: Group) -> dict[str, float]:
    """Return the exponent of each cost that is above 0 at every size, by key."""
    found = {}
    for figure in _COSTS:
        costs = [value.median for variant in SIZE_NAMES if (value := figure.of(group, variant, "wall_s")) is not None]
        if min(costs) > 0:
            found[figure.key] = fit(group.facts["sizes"], costs)["exponent"]
    return found


def _extra_rows(group: Group) -> Iterator[list[str]]:
    exponents = _exponents(group)
    yield ["exponent", "", *(f"{exponents[one.key]:.2f}" if one.key in exponents else "" for one in _COSTS)]


def _remarks(group: Group) -> Iterator[str]:
    packs = ", ".join(f"{run.outcome['packs']:,}" for run in group.runs[: len(SIZE_NAMES)])
    yield f"{packs} packs of {group.settings['pack_frames']} frames; an exponent of 1 is proportional, 0 is constant"


BENCHMARK = Benchmark(
    name="utterances",
    title="Number of utterances",
    prepare=prepare,
    variants={name: partial(at_size, number=number) for number, name in enumerate(SIZE_NAMES)},
    rows=SIZE_NAMES,
    figures=(Figure(key="size", title="thousands of utterances", text="{:.4g}", of=size_of), *_COSTS),
    remarks=_remarks,
    extra_rows=_extra_rows,
    sizes={
        "tiny": "--threads 1 --utterances 560 --rounds 1",
        "small": "--threads 1 --utterances 281241 --rounds 1",
        "base": "--threads 1 --utterances 281241 --rounds 1",
    },
)
