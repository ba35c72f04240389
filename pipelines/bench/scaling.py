"""`python -m pipelines bench scaling`: how cost grows with hours of audio, layers kept and number of utterances.

Three sizes each, all else equal: audio once, twice and four times as long; 3, 6 and 12 layers; as much audio in
utterances of 16, 4 and 1 s. At each size stage one runs from the loaded upstream to the manifest, and its store is then
opened and read once as training reads it. All of them take turns in every round (measure.py).

Two slopes are fitted to the three medians. The *exponent* is the slope of log cost over log size: 1 is proportional, 0
is flat. The straight line through cost over size gives what each more hour, layer or thousand utterances costs, and
what is there at no size at all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from extract.base.errors import unknown
from extract.base.malloc import keep_freed_blocks
from extract.base.timing import Progress, TimedRun, TimedSteps, in_fresh_process, range_of, run_interleaved
from extract.config import ExtractConfig
from extract.corpus import SAMPLE_RATE_HZ, Corpus
from extract.run import extract
from extract.store.reader import StoreReader
from pipelines.bench import material
from pipelines.bench.extract import extract_run
from pipelines.bench.material import Lengths
from pipelines.bench.measure import check_asked, headed

if TYPE_CHECKING:
    from rich.table import Table

_LAYERS = (3, 6, 12)
_UTTERANCE_S = (16, 4, 1)
HOURS, LAYERS, UTTERANCES = "hours of audio", "layers kept", "thousands of utterances"
ONE_MORE = {HOURS: "hour", LAYERS: "layer", UTTERANCES: "thousand"}
FIGURES = {
    "extract_cpu_s": "extraction, CPU s",
    "extract_wall_s": "extraction, s",
    "stored_mb": "store, MB",
    "open_cpu_s": "opening the store, CPU s",
    "epoch_cpu_s": "reading an epoch, CPU s",
}


@dataclass(frozen=True, kw_only=True)
class ScalingBench:
    """What `bench scaling` was asked for."""

    shape: str
    seconds: float  # of the smallest size
    rounds: int
    threads: int | None
    codec: str
    pack_frames: int

    def __post_init__(self) -> None:
        if self.shape not in material.SHAPES:
            raise unknown("shape", self.shape, material.SHAPES)
        check_asked(self, "seconds", "rounds", "pack_frames")


@dataclass(frozen=True)
class Point:
    """One size of one axis."""

    axis: str
    number: int
    seconds: float
    lengths: Lengths
    num_layers: int
    folder: Path  # of all that is made for it, below the benchmark's own

    def settings(self, asked: ScalingBench) -> ExtractConfig:
        return ExtractConfig(
            upstream=str(self.folder.parent / "teacher"),
            corpus=self.folder / "noise.h5",
            store=self.folder,
            manifest=self.folder / "manifest.json",
            layers=tuple(range(1, self.num_layers + 1)),
            codec=asked.codec,
            pack_frames=asked.pack_frames,
        )


def points(asked: ScalingBench, folder: Path) -> list[Point]:
    """Three sizes an axis. What is not the axis is twice the smallest audio, of 10 to 16 s, in 12 layers."""
    long, most = material.LENGTHS["long"], max(_LAYERS)
    even = max(1, round(2 * asked.seconds / max(_UTTERANCE_S))) * max(_UTTERANCE_S)  # whole utterances of any length
    sizes: list[tuple[str, float, Lengths, int]] = [(HOURS, asked.seconds * times, long, most) for times in (1, 2, 4)]
    sizes += [(LAYERS, 2 * asked.seconds, long, num_layers) for num_layers in _LAYERS]
    sizes += [(UTTERANCES, even, Lengths(length, length), most) for length in _UTTERANCE_S]
    return [
        Point(axis, place % 3, seconds, lengths, num_layers, folder / f"point-{place}")
        for place, (axis, seconds, lengths, num_layers) in enumerate(sizes)
    ]


def run_bench(asked: ScalingBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("scaling", asdict(asked))
    with TemporaryDirectory(prefix="retort-bench-") as name:
        asked_points = points(asked, Path(name))
        progress(f"making a teacher of {asked.shape}'s shape and {len(asked_points)} stores")
        sizes = in_fresh_process(prepare, asked, asked_points, threads=asked.threads)
        contenders: dict[str, Callable[[ScalingBench], TimedSteps]] = {}
        for point in asked_points:
            for kind, contender in (("extract", _extract), ("read", _read)):
                contenders[contender_name(point.axis, point.number, kind)] = partial(contender, point=point)
        turns = run_interleaved(contenders, asked, rounds=asked.rounds, threads=asked.threads, progress=progress)
    return head | {"axes": summarise(turns, sizes), "runs": [asdict(turn) for turn in turns]}


def contender_name(axis: str, number: int, kind: str) -> str:
    return f"{axis}, size {number + 1}, {kind}"


def prepare(asked: ScalingBench, asked_points: Sequence[Point]) -> dict[str, list[float]]:
    """Write the teacher, and every point's corpus and store; return each axis's sizes."""
    keep_freed_blocks()
    material.make_teacher(asked_points[0].folder.parent / "teacher", asked.shape)
    sizes: dict[str, list[float]] = {}
    for point in asked_points:
        settings = point.settings(asked)
        material.make_noise(settings.corpus, point.lengths, seconds=point.seconds)
        extract(settings)
        corpus = Corpus.open(settings.corpus)
        hours = float(corpus.num_samples.sum()) / SAMPLE_RATE_HZ / 3600
        size = {HOURS: hours, LAYERS: point.num_layers, UTTERANCES: len(corpus) / 1000}[point.axis]
        sizes.setdefault(point.axis, []).append(size)
    return sizes


def summarise(turns: Sequence[TimedRun], sizes: dict[str, list[float]]) -> dict[str, Any]:
    """Axis -> its sizes, and each figure's spread at every size, with both slopes through the medians."""
    found: dict[str, Any] = {}
    for axis, of_axis in sizes.items():
        figures: dict[str, list[Any]] = {figure: [] for figure in FIGURES}
        for number in range(len(of_axis)):
            made, read = (contender_name(axis, number, kind) for kind in ("extract", "read"))
            figures["extract_cpu_s"].append(range_of(turns, made, lambda turn: turn.cpu_s))
            figures["extract_wall_s"].append(range_of(turns, made, lambda turn: turn.wall_s))
            figures["stored_mb"].append(range_of(turns, made, lambda turn: turn.outcome["stored_bytes"] / 1e6))
            figures["open_cpu_s"].append(range_of(turns, read, lambda turn: turn.outcome["open_cpu_s"]))
            figures["epoch_cpu_s"].append(range_of(turns, read, lambda turn: turn.cpu_s))
        found[axis] = {
            "sizes": of_axis,
            "figures": {
                figure: {"at": [asdict(one) for one in spreads]} | fit(of_axis, [one.median for one in spreads])
                for figure, spreads in figures.items()
            },
        }
    return found


def fit(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """Least squares: `exponent` of log cost over log size; `each` and `fixed` of cost = fixed + each · size."""
    exponent, _ = np.polyfit(np.log(sizes), np.log(costs), 1).tolist()
    each, fixed = np.polyfit(sizes, costs, 1).tolist()
    return {"exponent": exponent, "each": each, "fixed": fixed}


def tables(result: dict[str, Any]) -> "list[Table]":
    """One table an axis, for the terminal."""
    from rich.table import Table

    found = []
    for axis, measured in result["axes"].items():
        table = Table(title=f"cost over {axis}", title_justify="left")
        table.add_column(axis)
        for size in measured["sizes"]:
            table.add_column(f"{size:.3g}", justify="right")
        for heading in ("exponent", f"each more {ONE_MORE[axis]}", "besides"):
            table.add_column(heading, justify="right")
        for figure, title in FIGURES.items():
            values = measured["figures"][figure]
            table.add_row(
                title,
                *(f"{one['median']:.3g}" for one in values["at"]),
                f"{values['exponent']:.2f}",
                *(f"{values[key]:.3g}" for key in ("each", "fixed")),
            )
        found.append(table)
    return found


def verdict(result: dict[str, Any]) -> str:
    """What the exponents say."""
    said = []
    for axis, measured in result["axes"].items():
        made, stored, read = (measured["figures"][name] for name in ("extract_cpu_s", "stored_mb", "epoch_cpu_s"))
        said.append(
            f"over {axis} {made['exponent']:.2f} (extraction), {stored['exponent']:.2f} (bytes) and "
            f"{read['exponent']:.2f} (reading an epoch)"
        )
    return f"exponents, by CPU time, where 1 is proportional and 0 is flat: {'; '.join(said)}"


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """A table an axis, then the exponents in a sentence."""
    return [*tables(result), verdict(result)]


# The contenders: each in a process of its own.


def _extract(asked: ScalingBench, *, point: Point) -> TimedSteps:
    """`extract run` with its upstream loaded, into a store of its own."""
    return (yield from extract_run(point.settings(asked)))


def _read(asked: ScalingBench, *, point: Point) -> TimedSteps:
    """The batches of one epoch; before it, the store is opened as training opens it."""
    from train.data import DistillationData

    keep_freed_blocks()
    settings = point.settings(asked)

    def opened() -> DistillationData:
        corpus = Corpus.open(settings.corpus)
        store = StoreReader.open(settings.manifest, corpus)
        layers = tuple(range(1, point.num_layers + 1))
        data = DistillationData(corpus, store, layers=layers, train_splits=("all",), dev_split=None, seed=0)
        data.training_batch(int(data.sampler.packs[0]))
        return data

    opened()  # imports, and the files into the system's cache
    clock = time.process_time()
    data = opened()
    open_cpu_s = time.process_time() - clock
    yield
    for pack in islice(data.sampler.from_position(0), len(data.sampler)):
        data.training_batch(pack)
    yield
    return {"open_cpu_s": open_cpu_s, "packs": len(data.sampler)}
