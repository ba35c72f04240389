"""Growing a student's depth while it trains: one operator, the methods are data (METHODS.md, section 1).

A method says, for a stack of `depth` layers that began as `first` ones, which layer each position of the deeper stack
copies. Everything else follows from that table: weights, optimiser moments and where the intermediate loss sits.

Positions are counted from 0. Of the positions that copy one layer, the first is that layer and the others are clones.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from extract.base.errors import RetortError
from train.config import GROWN, Family, GrowthConfig, StudentConfig

Sources = tuple[int, ...]  # for every position of the deeper stack the position it copies
V = TypeVar("V")


def _interleaved(depth: int, first: int, full: int) -> Sources:
    """At depth b·first copy every b-th layer and insert each clone right after its original (arXiv 2606.11766)."""
    block = depth // first
    return tuple(position for position in range(depth) for _ in range(2 if (position + 1) % block == 0 else 1))


def _gradual(depth: int, first: int, full: int) -> Sources:
    """Append a copy of the last `first` layers."""
    return (*range(depth), *range(depth - first, depth))


def _midas(depth: int, first: int, full: int) -> Sources:
    """Of n blocks of `first` layers, duplicate block ceil(n/2) right after itself."""
    end = -(-(depth // first) // 2) * first
    return (*range(end), *range(end - first, end), *range(end, depth))


def _progressive(depth: int, first: int, full: int) -> Sources:
    """Double: position i copies i mod depth (Gong et al. 2019)."""
    return (*range(depth), *range(depth))


def _one_shot(depth: int, first: int, full: int) -> Sources:
    """One expansion to full depth (arXiv 2511.04981). Each layer keeps its place, as in interleaved stacking.

    The order of the copies is our choice: the digest that METHODS.md rests on does not give it.
    """
    return tuple(position for position in range(depth) for _ in range(full // depth))


METHODS: dict[Family, Callable[[int, int, int], Sources]] = {
    "interleaved": _interleaved,
    "gradual": _gradual,
    "midas": _midas,
    "progressive": _progressive,
    "one-shot": _one_shot,
}
assert tuple(METHODS) == GROWN


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one depth."""

    first_step: int
    num_steps: int
    depth: int
    sources: Sources | None  # from the stage before; None for the first
    originals: tuple[int, ...]  # where the first model's layers are now


def plan_stages(config: StudentConfig) -> tuple[Stage, ...]:
    """All stages of a student; one for a family that does not grow.

    Raises RetortError when the method cannot reach the depth from `growth.first`, or has more stages than steps.
    """
    full = config.shape.layers
    if config.family not in METHODS:
        return (Stage(0, config.steps, full, None, tuple(range(full))),)
    tables = growth_tables(config.family, config.growth.first, full)
    bounds = _bounds(config.growth, config.steps, len(tables) + 1)
    depth, originals = config.growth.first, tuple(range(config.growth.first))
    stages = [Stage(0, bounds[1], depth, None, originals)]
    for index, sources in enumerate(tables, start=1):
        originals = tuple(sources.index(position) for position in originals)
        stages.append(Stage(bounds[index], bounds[index + 1] - bounds[index], len(sources), sources, originals))
    if any(stage.num_steps < 1 for stage in stages):
        raise RetortError(
            f"{config.family} grows {len(tables)} times, which {config.steps} steps leave no room for; raise `steps`"
        )
    return tuple(stages)


def growth_tables(method: Family, first: int, full: int) -> list[Sources]:
    """The sources of every growth step from `first` layers to `full`. Raises RetortError when `full` is missed."""
    tables: list[Sources] = []
    depths = [first]
    while 0 < depths[-1] < full:
        tables.append(METHODS[method](depths[-1], first, full))
        depths.append(len(tables[-1]))
        if depths[-1] == depths[-2]:
            break
    if depths[-1] != full:
        raise RetortError(
            f"{method} grows through {', '.join(map(str, depths))} layers and misses {full}; "
            "change shape.layers or growth.first"
        )
    return tables


def _bounds(config: GrowthConfig, steps: int, num_stages: int) -> list[int]:
    """First steps of all stages, and the end. PROP-a: stage i takes i^a / Σ j^a; EQL is a = 0."""
    if config.schedule == "late":
        rest = (1 - config.late_share) / max(1, num_stages - 1)
        parts = [config.late_share, *[rest] * (num_stages - 1)]
    else:
        exponent = config.exponent if config.schedule == "proportional" else 0.0
        parts = [float(index**exponent) for index in range(1, num_stages + 1)]
    return [round(steps * sum(parts[:index]) / sum(parts)) for index in range(num_stages + 1)]


def grow_layers(layers: nn.ModuleList, sources: Sources) -> nn.ModuleList:
    """The deeper stack. Originals stay the same modules; clones are deep copies of their present weights."""
    assert max(sources) < len(layers)
    return nn.ModuleList(
        layers[source] if sources.index(source) == position else copy.deepcopy(layers[source])
        for position, source in enumerate(sources)
    )


def grow_mapping(values: Mapping[str, V], sources: Sources, *, prefix: str) -> dict[str, V]:
    """Per-parameter values of the deeper model from those of the shallower one, both by parameter name.

    `prefix` names the stack, e.g. "student.encoder.layers."; other names keep their value.
    """
    grown = {name: value for name, value in values.items() if not name.startswith(prefix)}
    for position, source in enumerate(sources):
        start = f"{prefix}{source}."
        grown |= {
            f"{prefix}{position}.{name.removeprefix(start)}": value
            for name, value in values.items()
            if name.startswith(start)
        }
    return grown


def matched_position(stage: Stage, stages: tuple[Stage, ...], layer: int, last: int, place: str) -> int:
    """The position of the student's layer that is compared with teacher layer `layer` of `last`.

    "block-end": the layer as deep in the student as `layer` in the teacher, e.g. 4 -> 4 of 12 and 4 -> 1 of 3.
    "original": where the first model's layer is now that this was at the start.
    Raises RetortError when no layer is exactly as deep.
    """
    depth = stage.depth if place == "block-end" else stages[0].depth
    if layer * depth % last:
        raise RetortError(
            f"teacher layer {layer} of {last} has no counterpart in a student of {depth} layers; "
            "change targets, shape.layers or growth.first"
        )
    position = layer * depth // last - 1
    if position == depth - 1:
        return stage.depth - 1  # the teacher's last layer is always the student's last
    return position if place == "block-end" else stage.originals[position]
