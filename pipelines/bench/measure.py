"""Benchmarks as declarative records, and the one way to run them.

A benchmark prepares its input once, in a process of its own, and runs its variants interleaved
(`extract.base.timing`). Every variant gets the same `Bench`; figures are computed from the runs.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from extract.base.machine import describe_machine
from extract.base.timing import (
    CLOCKS,
    Progress,
    Range,
    TimedRun,
    TimedSteps,
    in_fresh_process,
    range_of,
    run_interleaved,
    speed_ratio,
)
from extract.config import ExtractConfig
from pipelines.bench.options import Options

Asked = TypeVar("Asked", bound=Options)
AskedCo = TypeVar("AskedCo", bound=Options, covariant=True)
WALL, BOTH = ("wall_s",), tuple(CLOCKS)  # clocks of a figure; those without a clock have the key wall_s
# Other versions of these make figures outdated.
_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "h5py")


@dataclass(frozen=True)
class Bench(Generic[AskedCo]):
    """Input of a variant: the options, the folder that `prepare` filled, and the group whose files are used."""

    options: AskedCo
    folder: Path
    group: str = ""

    @property
    def corpus(self) -> Path:
        return self.folder / f"{self.group.replace(' ', '-') or 'noise'}.h5"

    @property
    def manifest(self) -> Path:
        return self.corpus.with_suffix(".manifest.json")

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def of(self, group: str) -> "Bench[AskedCo]":
        """Return the input of another group."""
        return replace(self, group=group)

    def extract_config(self, **changes: Any) -> ExtractConfig:
        """Return the request of `extract run` for the group's corpus; `changes` are fields of it."""
        config = ExtractConfig(
            upstream=str(self.teacher),
            corpus=self.corpus,
            manifest=self.manifest,
            store=self.folder / "stores",
            codec=self.options.codec,
            pack_frames=self.options.pack_frames,
        )
        return replace(config, **changes)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of the variants on one input, such as short utterances; `facts` is what `prepare` returned for it."""

    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    runs: Sequence[TimedRun]

    @classmethod
    def of(cls, result: Mapping[str, Any], name: str) -> "Group":
        """Return a group of a stored result."""
        stored = result["groups"][name]
        return cls(settings=result["settings"], facts=stored["facts"], runs=[TimedRun(**run) for run in stored["runs"]])

    def range(self, variant: str, figure: Callable[[TimedRun], float]) -> Range:
        return range_of(self.runs, variant, figure)

    def ratio(self, one: str, other: str, clock: str) -> Range:
        """Return how many times as fast `one` is as `other`, paired by round."""
        return speed_ratio(self.runs, one, other, clock)

    def has(self, variant: str) -> bool:
        return any(run.variant == variant for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of every variant: a key of the JSON and a column of the table.

    `of` maps (group, variant, clock) to the figure, None where it has no meaning; `scale` and `text` format it.
    """

    key: str  # in SI units
    title: str  # with the unit of the table
    text: str  # format of one number, such as {:.1f}
    of: Callable[[Group, str, str], Range | None]
    clocks: Sequence[str] = WALL
    scale: float = 1.0
    ranged: bool = False  # show minimum and maximum too


def over_rounds(figure: Callable[[Group, TimedRun, str], float]) -> Callable[[Group, str, str], Range]:
    """Return the `of` of a figure that each run has: figure(group, run, clock)."""
    return lambda group, variant, clock: group.range(variant, lambda run: float(figure(group, run, clock)))


seconds_per_step = over_rounds(lambda group, run, clock: getattr(run, clock) / group.settings["steps"])


@dataclass(frozen=True)
class Named:
    """A variant and the words for it in a sentence."""

    variant: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[Asked]):
    """One benchmark: what it measures, against its upper bound (`limit`) and the usual approach (`baseline`).

    prepare: fill the folder and return the facts of each group (JSON); runs in a fresh process.
    variants: name -> generator function of `extract.base.timing`. Outcomes with a key `work` must agree in it.
    claim: least speed of `subject` as (reference, ratio), from settings and name of the group.
    measures: whether a group runs a variant, from the names of both.
    remarks: more sentences on a group; extra_rows: more table rows, of its own figures.
    sizes: arguments of `bench all` by size.
    """

    name: str
    title: str
    prepare: Callable[[Bench[Asked]], dict[str, dict[str, Any]]]
    variants: Mapping[str, Callable[[Bench[Asked]], TimedSteps]]
    rows: Sequence[str]  # variants of the table; others serve figures and remarks only
    figures: Sequence[Figure]  # own figures; ratios and memory are added to all benchmarks
    subject: Named | None = None  # the variant that the sentences are about
    limit: Named | None = None
    baseline: Named | None = None
    claim: Callable[[Mapping[str, Any], str], tuple[Named, float]] | None = None
    measures: Callable[[str, str], bool] = lambda group, variant: True
    remarks: Callable[[Group], Iterable[str]] = lambda group: ()
    extra_rows: Callable[[Group], Iterable[Sequence[str]]] = lambda group: ()
    sizes: Mapping[str, str]

    @property
    def all_figures(self) -> tuple[Figure, ...]:
        """Return the benchmark's own figures, then ratios to limit and baseline, then memory."""
        found = [*self.figures]
        if self.limit is not None:
            found.append(_speed_figure(self.limit.variant, "of the speed of {}", "{:.1%}"))
        if self.baseline is not None:
            found.append(_speed_figure(self.baseline.variant, "times as fast as {}", "{:.2f}"))
        found += [_memory("peak_bytes", "peak memory"), _memory("peak_gpu_bytes", "peak GPU memory")]
        if self.baseline is not None:
            found.append(memory_ratio(self.baseline.variant))
        return tuple(found)


def _speed_figure(other: str, title: str, text: str) -> Figure:
    return Figure(
        key=f"times_as_fast_as_{other}",
        title=title.format(other),
        text=text,
        of=lambda group, variant, clock: None if variant == other else group.ratio(variant, other, clock),
        clocks=BOTH,
    )


def _memory(field: str, title: str) -> Figure:
    def of(group: Group, variant: str, clock: str) -> Range | None:
        if any(getattr(run, field) is None for run in group.runs if run.variant == variant):
            return None  # nothing ran on a GPU
        return group.range(variant, lambda run: float(getattr(run, field)))

    return Figure(key=field, title=title, text="{:,.0f} MiB", of=of, scale=2**-20)


def memory_ratio(other: str) -> Figure:
    def of(group: Group, variant: str, clock: str) -> Range | None:
        on_gpu = all(run.peak_gpu_bytes is not None for run in group.runs if run.variant in (variant, other))
        used = lambda run: float(run.peak_gpu_bytes if on_gpu else run.peak_bytes)  # noqa: E731
        if variant == other:
            return None
        # Memory is not paired by round: a slow machine does not change it.
        return Range.of([group.range(variant, used).median / group.range(other, used).median])

    return Figure(key="share_of_memory", title=f"of the memory of {other}", text="{:.2f}", of=of)


def summarise(benchmark: Benchmark[Any], group: Group) -> dict[str, dict[str, dict[str, Range]]]:
    """Return variant -> figure -> clock -> range over the rounds. Figures without a meaning are left out."""
    found: dict[str, dict[str, dict[str, Range]]] = {}
    for variant in filter(group.has, benchmark.rows):
        for figure in benchmark.all_figures:
            ranges = {clock: value for clock in figure.clocks if (value := figure.of(group, variant, clock))}
            if ranges:
                found.setdefault(variant, {})[figure.key] = ranges
    return found


def measure(benchmark: Benchmark[Asked], options: Asked, progress: Progress) -> dict[str, Any]:
    """Run all variants of a benchmark; return settings, runs and figures, ready for JSON."""
    settings = {key: value.as_posix() if isinstance(value, Path) else value for key, value in asdict(options).items()}
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        # Load average: other work that ran when the benchmark began.
        "machine": describe_machine() | {"load_before": round(os.getloadavg()[0], 2)},
        "versions": library_versions(),
        "settings": settings,
        "groups": {},
    }
    with TemporaryDirectory(prefix="retort-bench-") as name:
        bench = Bench(options, Path(name))
        # In a process of its own: this one stays small, and threads are set when torch is imported.
        progress("preparing models, corpora and stores")
        for title, facts in in_fresh_process(benchmark.prepare, bench, threads=options.threads).items():
            runs = run_interleaved(
                {name: variant for name, variant in benchmark.variants.items() if benchmark.measures(title, name)},
                bench.of(title),
                rounds=options.rounds,
                threads=options.threads,
                progress=lambda text, title=title: progress(f"{title}, {text}" if title else text),  # type: ignore[misc]
            )
            # A faster variant that did less would be a wrong figure, not a good one.
            work = {json.dumps(run.outcome["work"]) for run in runs if "work" in run.outcome}
            assert len(work) <= 1, f"variants of {benchmark.name} differ in the work that they did: {work}"
            result["groups"][title] = group_record(benchmark, Group(settings=settings, facts=facts, runs=runs))
    return result


def group_record(benchmark: Benchmark[Any], group: Group) -> dict[str, Any]:
    """Return a group with its figures, ready for JSON."""
    figures = {
        variant: {key: {clock: asdict(value) for clock, value in ranges.items()} for key, ranges in row.items()}
        for variant, row in summarise(benchmark, group).items()
    }
    return {"facts": dict(group.facts), "figures": figures, "runs": [asdict(run) for run in group.runs]}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that timings depend on."""
    return {library: version(library) for library in _LIBRARIES}
