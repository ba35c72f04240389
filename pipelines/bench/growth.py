"""`python -m pipelines bench growth`: whole runs of a student that grows beside runs at full depth.

    online, full          the papers' baseline: the teacher on every batch, waveforms, all layers from the first step on
    waveforms, METHOD     cached teacher, the stem trained
    stored, METHOD        cached teacher, the frozen stem's output from the store

Methods are full depth, interleaved stacking with both schedules, and stackings with other stages; `shallow` is the
first stage's depth all along, which no method can be faster than. All runs have the same steps over the same packs,
growth included. Three figures stand beside each other: what was measured; the *ideal*, full depth over the mean depth;
and the *bound*, what a step's time allows, which depends on depth in part only: t(d) = t(shallow) + slope (d - first).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from extract.base.errors import RetortError
from extract.base.malloc import keep_freed_blocks
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
from pipelines.bench.measure import headed
from pipelines.bench.train import Bench, TrainBench, load_teacher, prepare, taught
from train.config import GROWN, StudentConfig
from train.data import Batch
from train.growth import plan_stages
from train.loop import train_step
from train.optimiser import learning_rate
from train.run import begin, grow, stage_at

if TYPE_CHECKING:
    from rich.table import Table

Change = Callable[[StudentConfig], StudentConfig]
FULL, SHALLOW = "full", "shallow"


def _growing(**growth: Any) -> Change:
    family = growth.pop("family", "interleaved")
    return lambda config: replace(config, family=family, growth=replace(config.growth, **growth))


METHODS: dict[str, Change] = {
    FULL: lambda config: replace(config, family="layerwise"),
    SHALLOW: lambda config: replace(
        config, family="layerwise", shape=replace(config.shape, layers=config.growth.first)
    ),
    "interleaved EQL": _growing(schedule="equal"),
    "interleaved PROP-1": _growing(schedule="proportional", exponent=1.0),
    "progressive": _growing(family="progressive", schedule="equal"),
    "one-shot": _growing(family="one-shot", schedule="late"),
}
SOURCES = ("waveforms", "stored")
ONLINE = f"online, {FULL}"


@dataclass(frozen=True)
class GrowthBench:
    """What every contender is given: the bench of one step, whose `steps` are here those of a whole run."""

    step: Bench

    def config(self, method: str) -> StudentConfig:
        """The student of a method, with as many steps as were asked for."""
        return METHODS[method](replace(self.step.config, steps=self.step.asked.steps))


def run_bench(asked: TrainBench, progress: Progress) -> dict[str, Any]:
    """Measure, and return all that was asked for, seen and made of it, ready for JSON."""
    head = headed("growth", asdict(asked))
    with TemporaryDirectory(prefix="retort-bench-") as name:
        bench = GrowthBench(Bench(asked, Path(name)))
        progress(f"making a teacher of {asked.shape}'s shape and its store")
        in_fresh_process(prepare, bench.step, threads=asked.threads)
        if bench.step.config.family not in GROWN:
            raise RetortError(f"--student {asked.student} does not grow; give one of family {', '.join(GROWN)}")
        depths = {method: _depths(bench.config(method)) for method in METHODS}
        turns = run_interleaved(CONTENDERS, bench, rounds=asked.rounds, threads=asked.threads, progress=progress)
        section = asdict(bench.step.config)
    return (
        head
        | {
            "student": section,
            "depth_of_steps": depths,
            "runs": [asdict(turn) for turn in turns],
        }
        | summarise(turns, depths)
    )


def _depths(config: StudentConfig) -> list[int]:
    """The depth of every step. Raises RetortError for fewer steps than stages."""
    stages = plan_stages(config)
    return [stage_at(stages, step).depth for step in range(config.steps)]


def summarise(turns: Sequence[TimedRun], depths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Of the raw figures: memory and ideal of each contender; by each clock its seconds, speed-ups and bound."""
    contenders: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(turn.variant for turn in turns):
        source, method = name.split(", ")
        contenders[name] = {
            "peak_bytes": asdict(range_of(turns, name, lambda turn: turn.peak_bytes)),
            "ideal": sum(depths[FULL]) / sum(depths[method]),
        } | {clock: _by_clock(turns, name, source, depths, depths[method], clock) for clock in CLOCKS}
    return {"contenders": contenders}


def _by_clock(
    turns: Sequence[TimedRun],
    name: str,
    source: str,
    of: Mapping[str, Sequence[int]],
    depths: Sequence[int],
    clock: str,
) -> dict[str, Any]:
    def seconds(contender: str) -> Range:
        return range_of(turns, contender, lambda turn: getattr(turn, clock))

    figures: dict[str, Any] = {
        "seconds": asdict(seconds(name)),
        "times_as_fast_as_online": asdict(speed_ratio(turns, name, ONLINE, clock)),
    }
    if source in SOURCES:
        full = f"{source}, {FULL}"
        figures["times_as_fast_as_full"] = asdict(speed_ratio(turns, name, full, clock))
        figures["bound"] = _bound(
            depths,
            deep=of[FULL][0],
            deep_s=seconds(full).median,
            shallow=of[SHALLOW][0],
            shallow_s=seconds(f"{source}, {SHALLOW}").median,
        )
    return figures


def _bound(depths: Sequence[int], *, deep: int, deep_s: float, shallow: int, shallow_s: float) -> float:
    """The speed-up over full depth if a step's time were linear in depth, through two measured runs of all steps."""
    slope_s = (deep_s - shallow_s) / (deep - shallow)
    run_s = sum(shallow_s + slope_s * (depth - shallow) for depth in depths) / len(depths)
    return deep_s / run_s


def table_of(result: dict[str, Any]) -> "Table":
    """One row a contender and clock, for the terminal."""
    from rich.table import Table

    asked = result["settings"]
    table = Table(
        title=f"{asked['steps']} steps of {asked['student']}, teacher of {asked['shape']}'s shape, {asked['device']}, "
        f"{asked['dtype']}",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("clock", "seconds", "than full depth", "ideal", "bound", "of the bound", "than online", "memory"):
        table.add_column(heading, justify="right")
    for name, figures in result["contenders"].items():
        for clock, title in CLOCKS.items():
            by_clock = figures[clock]
            seconds, faster = by_clock["seconds"], by_clock.get("times_as_fast_as_full")
            cells = [f"{faster['median']:.2f}×", f"{figures['ideal']:.2f}×", f"{by_clock['bound']:.2f}×",
                     f"{faster['median'] / by_clock['bound']:.0%}"] if faster else [""] * 4  # fmt: skip
            first = clock == next(iter(CLOCKS))
            table.add_row(
                name if first else "",
                title,
                f"{seconds['median']:.1f} ({seconds['min']:.1f}–{seconds['max']:.1f})",
                *cells,
                f"{by_clock['times_as_fast_as_online']['median']:.2f}×",
                f"{figures['peak_bytes']['median'] / 2**20:,.0f} MiB" if first else "",
            )
    return table


def shown(result: dict[str, Any]) -> "list[Table | str]":
    """The table, and what growing from the stored stem gains."""
    grown = result["contenders"]["stored, interleaved EQL"]
    figures = grown["cpu_s"]
    gained, online = figures["times_as_fast_as_full"]["median"], figures["times_as_fast_as_online"]["median"]
    memory = grown["peak_bytes"]["median"] / result["contenders"][ONLINE]["peak_bytes"]["median"]
    return [
        table_of(result),
        f"by CPU time interleaved EQL from the stored stem is {gained:.2f} times as fast as full depth, "
        f"{gained / grown['ideal']:.0%} of the ideal and {gained / figures['bound']:.0%} of what a step's time allows; "
        f"it is {online:.2f} times as fast as full depth with the teacher online, in {memory:.2f} of the memory",
    ]


def _whole_run(bench: GrowthBench, *, source: str, method: str) -> TimedSteps:
    """All steps of one student, growth included; one step before the clock starts."""
    keep_freed_blocks()  # as the command does
    config = bench.config(method)
    job = bench.step.job(frozen=source == "stored", stored=source == "stored")
    settings = replace(config, optimiser=job.config.optimiser, stem=job.config.stem)
    run = begin(replace(job, config=settings))
    change: Callable[[Batch], Batch] = lambda batch: batch  # noqa: E731
    if source == "online":
        change = partial(taught, run, load_teacher(bench.step))

    def changed(read: Generator[Batch]) -> Generator[Batch]:
        for batch in read:
            yield change(batch)

    with closing(run.data.training_batches(0)) as read:
        batches = changed(read)
        train_step(run, batches, 0, learning_rate(settings, run.stages[0], 0))
        yield
        losses = []
        for step in range(settings.steps):
            stage = stage_at(run.stages, step)
            if step == stage.first_step and stage.sources is not None:
                grow(run, stage)
            losses.append(train_step(run, batches, step, learning_rate(settings, stage, step)))
        yield
    return {"losses": losses, "depth": run.depth, "threads": torch.get_num_threads()}


CONTENDERS: dict[str, Callable[[GrowthBench], TimedSteps]] = {
    ONLINE: partial(_whole_run, source="online", method=FULL),
    **{
        f"{source}, {method}": partial(_whole_run, source=source, method=method)
        for source in SOURCES
        for method in METHODS
    },
}
