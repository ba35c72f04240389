"""`python -m pipelines bench growth`: whole runs of a student that grows against runs at full depth.

`options.GrowthOptions` describes the variants. All runs have the same steps over the same packs, growth included. Two
figures stand beside each speed-up: *ideal* is full depth over the mean depth; *bound* assumes a step's time that is
linear in depth, t(d) = t(shallow) + slope (d - first).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from extract.base.errors import RetortError
from extract.base.timing import Range, TimedSteps
from pipelines.bench.measure import BOTH, Benchmark, Figure, Group, Named, over_rounds
from pipelines.bench.train import Train, student_config, timed_steps
from pipelines.bench.train import prepare as prepare_steps
from train.config import GROWN, StudentConfig
from train.growth import plan_stages
from train.run import stage_at

FULL, SHALLOW = "full", "shallow"  # depth of all steps: of the finished student, of the first stage
SOURCES = ("waveforms", "stored")  # of the stem's output; both have a cached teacher
ONLINE = Named(f"online, {FULL}", "full depth with the teacher online")


def _growing(**growth: Any) -> Callable[[StudentConfig], StudentConfig]:
    family = growth.pop("family", "interleaved")
    return lambda config: replace(config, family=family, growth=replace(config.growth, **growth))


METHODS: dict[str, Callable[[StudentConfig], StudentConfig]] = {
    # `layerwise` is the same student with all layers from the first step on.
    FULL: lambda config: replace(config, family="layerwise"),
    SHALLOW: lambda config: replace(
        config, family="layerwise", shape=replace(config.shape, layers=config.growth.first)
    ),
    "interleaved EQL": _growing(schedule="equal"),
    "interleaved PROP-1": _growing(schedule="proportional", exponent=1.0),
    "progressive": _growing(family="progressive", schedule="equal"),
    "one-shot": _growing(family="one-shot", schedule="late"),
}


def prepare(bench: Train) -> dict[str, dict[str, Any]]:
    """Write teacher, noise and store; return the depth of every step by method.

    Raises RetortError for a student that does not grow and for fewer steps than stages.
    """
    facts = prepare_steps(bench)
    if student_config(bench).family not in GROWN:
        raise RetortError(f"--student {bench.options.student} does not grow; give one of family {', '.join(GROWN)}")
    facts[""]["depth_of_steps"] = {method: depths(method_config(bench, method=method)) for method in METHODS}
    return facts


def method_config(bench: Train, *, method: str) -> StudentConfig:
    """Return the student of a method, with the number of steps of the options."""
    return METHODS[method](replace(student_config(bench), steps=bench.options.steps))


def depths(config: StudentConfig) -> list[int]:
    """Return the depth of every step. Raises RetortError for fewer steps than stages."""
    stages = plan_stages(config)
    return [stage_at(stages, step).depth for step in range(config.steps)]


def _whole_run(source: str, method: str) -> Callable[[Train], TimedSteps]:
    """Return the variant that trains all steps of one student."""
    stored, kind = source == "stored", "online" if source == "online" else "store"
    config_of = partial(method_config, method=method)
    return partial(timed_steps, frozen=stored, stored=stored, kind=kind, config_of=config_of, first=0)


_seconds = over_rounds(lambda group, run, clock: getattr(run, clock))


def _than_full(group: Group, variant: str, clock: str) -> Range | None:
    source, method = variant.split(", ")
    if source not in SOURCES or method == FULL:
        return None
    return group.ratio(variant, f"{source}, {FULL}", clock)


def _ideal(group: Group, variant: str, clock: str) -> Range | None:
    depth_of_steps, method = group.facts["depth_of_steps"], variant.split(", ")[1]
    if _than_full(group, variant, clock) is None:
        return None
    return Range.of([sum(depth_of_steps[FULL]) / sum(depth_of_steps[method])])


def _bound(group: Group, variant: str, clock: str) -> Range | None:
    """Return the speed-up over full depth if a step's time were linear in depth, from full and shallow runs."""
    if _than_full(group, variant, clock) is None:
        return None
    source, method = variant.split(", ")
    depth_of_steps: dict[str, Sequence[int]] = group.facts["depth_of_steps"]
    deep, shallow = depth_of_steps[FULL][0], depth_of_steps[SHALLOW][0]
    deep_s, shallow_s = (_seconds(group, f"{source}, {one}", clock).median for one in (FULL, SHALLOW))
    # Seconds of a whole run for each block; the intercept is the stem, the loss and the optimiser.
    slope_s = (deep_s - shallow_s) / (deep - shallow)
    steps = depth_of_steps[method]  # depth of each step
    run_s = sum(shallow_s + slope_s * (depth - shallow) for depth in steps) / len(steps)
    return Range.of([deep_s / run_s])


def _of_bound(group: Group, variant: str, clock: str) -> Range | None:
    faster, bound = _than_full(group, variant, clock), _bound(group, variant, clock)
    return Range.of([faster.median / bound.median]) if faster and bound else None


def _remarks(group: Group) -> Iterator[str]:
    settings, grown = group.settings, _SUBJECT.variant
    # By CPU time: whole runs take long, and other work on the machine changes it little.
    gained, ideal, of_bound = (one(group, grown, "cpu_s") for one in (_than_full, _ideal, _of_bound))
    assert gained and ideal and of_bound
    yield (
        f"{settings['steps']} steps of {settings['student']}, teacher of {settings['shape']}'s shape, "
        f"{settings['device']}, {settings['dtype']}"
    )
    yield (
        f"by CPU time {_SUBJECT.title} is {gained.median:.2f} times as fast as full depth, "
        f"{gained.median / ideal.median:.0%} of the ideal and {of_bound.median:.0%} of the bound"
    )


_SUBJECT = Named("stored, interleaved EQL", "interleaved EQL from the stored stem")
_VARIANTS = {ONLINE.variant: _whole_run("online", FULL)} | {
    f"{source}, {method}": _whole_run(source, method) for source in SOURCES for method in METHODS
}
_DEMO = "--threads 1 --shape hubert-demo --student interleaved"

BENCHMARK = Benchmark(
    name="growth",
    title="Growth",
    prepare=prepare,
    variants=_VARIANTS,
    rows=tuple(_VARIANTS),
    figures=(
        Figure(key="seconds", title="seconds", text="{:.1f}", of=_seconds, clocks=BOTH, ranged=True),
        Figure(key="times_as_fast_as_full", title="than full depth", text="{:.2f}×", of=_than_full, clocks=BOTH),
        Figure(key="ideal", title="ideal", text="{:.2f}×", of=_ideal),
        Figure(key="bound", title="bound", text="{:.2f}×", of=_bound, clocks=BOTH),
        Figure(key="share_of_bound", title="of the bound", text="{:.0%}", of=_of_bound, clocks=BOTH),
    ),
    subject=_SUBJECT,
    baseline=ONLINE,
    remarks=_remarks,
    sizes={
        "tiny": f"{_DEMO} --seconds 12 --pack-frames 800 --rounds 1 --steps 8",
        "small": f"{_DEMO} --seconds 90 --pack-frames 2048 --steps 8 --rounds 1",
        "base": "--threads 1 --seconds 64 --pack-frames 800 --steps 8 --rounds 1",
    },
)
