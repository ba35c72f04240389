"""`python -m pipelines bench scaling`: growth of cost with hours of audio, layers kept and number of utterances.

Three sizes each, all else equal: audio once, twice and four times as long; 3, 6 and 12 layers; as much audio in
utterances of 16, 4 and 1 s. At each size a store is opened and read once as training reads it; then stage one makes
another of the same settings, from the loaded upstream to the manifest.

Two slopes are fitted to the three medians of each figure. `exponent` is the slope of log cost over log size: 1 is
proportional, 0 is constant. The straight line through cost over size gives the cost of one more hour, layer or thousand
utterances, and the cost at size zero.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from extract.base.malloc import configure_memory
from extract.base.timing import Range, TimedRun, TimedSteps
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import extract as extract_store
from extract.store.reader import StoreReader
from pipelines.bench import synthetic
from pipelines.bench.extract import extract_run
from pipelines.bench.load import epoch
from pipelines.bench.measure import BOTH, Bench, Benchmark, Figure, Group, over_rounds
from pipelines.bench.options import ScalingOptions
from pipelines.bench.synthetic import Lengths

Scaling = Bench[ScalingOptions]
_LAYERS = (3, 6, 12)
_UTTERANCE_S = (16, 4, 1)  # so that the number of utterances grows
HOURS, LAYERS, UTTERANCES = "hours of audio", "layers kept", "thousands of utterances"
ONE_MORE = {HOURS: "hour", LAYERS: "layer", UTTERANCES: "thousand"}
SIZE_NAMES = ("size 1", "size 2", "size 3")


@dataclass(frozen=True)
class Point:
    """One size of one axis: seconds of audio, lengths of utterances and number of layers."""

    seconds: float
    lengths: Lengths
    num_layers: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(1, self.num_layers + 1))


def points(options: ScalingOptions) -> dict[str, list[Point]]:
    """Return three points of each axis; the rest is twice the smallest audio, utterances of 10 to 16 s, 12 layers."""
    long, twice, most = synthetic.LENGTHS["long"], 2 * options.seconds, max(_LAYERS)
    whole = max(1, round(twice / max(_UTTERANCE_S))) * max(_UTTERANCE_S)  # a multiple of every length of utterance
    return {  # the order of each axis is the order of its sizes
        HOURS: [Point(options.seconds * times, long, most) for times in (1, 2, 4)],
        LAYERS: [Point(twice, long, num_layers) for num_layers in _LAYERS],
        UTTERANCES: [Point(whole, Lengths(length, length), most) for length in _UTTERANCE_S],
    }


def prepare(bench: Scaling) -> dict[str, dict[str, Any]]:
    """Write the teacher, and the corpus and store of every point; return the sizes of each axis."""
    configure_memory()
    synthetic.make_teacher(bench.teacher, bench.options.shape)
    facts: dict[str, dict[str, Any]] = {axis: {"unit": unit, "sizes": []} for axis, unit in ONE_MORE.items()}
    for axis, of_axis in points(bench.options).items():
        for number, point in enumerate(of_axis):
            config = bench.of(f"{axis} {number}").extract_config(layers=point.layers)
            synthetic.make_noise(config.corpus, point.lengths, seconds=point.seconds)
            extract_store(config)
            corpus = Corpus.open(config.corpus)
            hours = float(corpus.num_samples.sum()) / SAMPLE_RATE_HZ / 3600
            size = {HOURS: hours, LAYERS: point.num_layers, UTTERANCES: len(corpus) / 1000}[axis]
            facts[axis]["sizes"].append(size)
    return facts


def at_size(bench: Scaling, *, number: int) -> TimedSteps:
    """Read the prepared store, by clocks of its own; then extract the same corpus on the clock."""
    layers = points(bench.options)[bench.group][number].layers
    config = bench.of(f"{bench.group} {number}").extract_config(layers=layers)
    reading = _read_epoch(config)  # first, while the process has neither buffers nor threads of extraction
    outcome = yield from extract_run(config)
    return reading | {"stored_bytes": outcome["stored_bytes"]}


def _read_epoch(config: ExtractConfig) -> dict[str, float]:
    """Return the CPU seconds of opening a store as training does, and of reading the batches of one epoch."""
    from train.data import DistillationData

    layers = config.layers
    assert layers is not None  # every point names them

    def opened() -> DistillationData:
        corpus = Corpus.open(config.corpus)
        store = StoreReader.open(config.manifest, corpus)
        data = DistillationData(corpus, store, layers=layers, train_splits=("all",), dev_split=None, seed=0)
        data.training_parts(int(data.sampler.packs[0]))
        return data

    configure_memory()  # as the command does
    opened()  # imports, and the files into the system's cache
    start = time.process_time()
    data = opened()
    ready = time.process_time()
    for pack in epoch(data):
        data.training_parts(pack)
    return {"open_cpu_s": ready - start, "epoch_cpu_s": time.process_time() - ready}


def fit(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Return least-squares slopes: `exponent` of log cost over log size; `each` and `fixed` of fixed + each · size."""
    # log cost = exponent · log size + constant
    exponent, _ = np.polyfit(np.log(sizes), np.log(costs), 1).tolist()
    each, fixed = np.polyfit(sizes, costs, 1).tolist()
    return {"exponent": exponent, "each": each, "fixed": fixed}


def size_of(group: Group, variant: str, clock: str) -> Range:
    """Return the size that a variant has, a figure of its row."""
    return Range.of([group.facts["sizes"][SIZE_NAMES.index(variant)]])


def _figure(key: str, title: str, figure: Callable[[Group, TimedRun, str], float], **more: Any) -> Figure:
    return Figure(key=key, title=title, text="{:.3g}", of=over_rounds(figure), **more)


_FIGURES = (
    Figure(key="size", title="size", text="{:.3g}", of=size_of),
    _figure("extract_s", "extraction, s", lambda group, run, clock: getattr(run, clock), clocks=BOTH),
    _figure("stored_bytes", "store, MB", lambda group, run, clock: run.outcome["stored_bytes"], scale=1e-6),
    _figure("open_cpu_s", "opening, CPU s", lambda group, run, clock: run.outcome["open_cpu_s"]),
    _figure("epoch_cpu_s", "reading an epoch, CPU s", lambda group, run, clock: run.outcome["epoch_cpu_s"]),
)


def _slopes(group: Group, figure: Figure, clock: str) -> dict[str, float]:
    costs = [figure.of(group, variant, clock) for variant in SIZE_NAMES]
    return fit(group.facts["sizes"], [cost.median * figure.scale for cost in costs if cost is not None])


def _extra_rows(group: Group) -> Iterator[list[str]]:
    """Yield a row for each kind of slope, with a cell for each figure after the size."""
    titles = {"exponent": "exponent", "each": f"each more {group.facts['unit']}", "fixed": "at size zero"}
    for key, title in titles.items():
        text = "{:.2f}" if key == "exponent" else "{:.3g}"
        cells = (
            " / ".join(text.format(_slopes(group, figure, clock)[key]) for clock in figure.clocks)
            for figure in _FIGURES[1:]
        )
        yield [title, "", *cells]  # the size has no slope


def _remarks(group: Group) -> Iterator[str]:
    extraction, stored, _, reading = (_slopes(group, figure, figure.clocks[-1])["exponent"] for figure in _FIGURES[1:])
    yield (
        f"exponents {extraction:.2f} (extraction, by CPU time), {stored:.2f} (bytes) and {reading:.2f} (reading an "
        "epoch, by CPU time); 1 is proportional, 0 is constant"
    )


BENCHMARK = Benchmark(
    name="scaling",
    title="Scaling",
    prepare=prepare,
    variants={name: partial(at_size, number=number) for number, name in enumerate(SIZE_NAMES)},
    rows=SIZE_NAMES,
    figures=_FIGURES,
    remarks=_remarks,
    extra_rows=_extra_rows,
    sizes={
        "tiny": "--threads 1 --seconds 8 --rounds 1 --pack-frames 800",
        "small": "--threads 1 --seconds 60 --rounds 2",
        "base": "--threads 1 --shape hubert-base --seconds 60 --rounds 1",
    },
)
