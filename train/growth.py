"""Growth of a student's depth during training (docs/methods.md, Growth).

A growth method is a function to a table of sources: sources[i] is the layer of the shallower stack that position i of
the deeper stack copies. One operator applies a table to weights (`grow_layers`) and to values by parameter name, such
as optimiser moments (`grow_mapping`). The table also decides which layers the intermediate loss compares.

Positions count from 0. Of the positions that copy the same layer, the first is that layer itself; the others are
clones. Example, interleaved from 3 to 6 layers: sources (0, 0, 1, 1, 2, 2), clones at positions 1, 3 and 5.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from extract.base.errors import RetortError
from train.config import GROWN, Family, GrowthConfig, StudentConfig
from train.modeling_retort import TransformerLayer

Sources = tuple[int, ...]  # for every position of the deeper stack, the position that it copies
V = TypeVar("V")


def _interleaved(depth: int, first: int, full: int) -> Sources:
    """At depth b·first copy every b-th layer and insert each clone right after its original (arXiv 2606.11766)."""
    block = depth // first  # copies of each layer of the first model so far
    return tuple(position for position in range(depth) for _ in range(2 if (position + 1) % block == 0 else 1))


def _gradual(depth: int, first: int, full: int) -> Sources:
    """Append a copy of the last `first` layers (gradual stacking)."""
    return (*range(depth), *range(depth - first, depth))


def _midas(depth: int, first: int, full: int) -> Sources:
    """Of n blocks of `first` layers, duplicate block ceil(n/2) right after itself (MIDAS)."""
    end = -(-(depth // first) // 2) * first  # of the block that is copied
    return (*range(end), *range(end - first, end), *range(end, depth))


def _progressive(depth: int, first: int, full: int) -> Sources:
    """Double the stack: position i copies i mod depth (progressive stacking, Gong et al. 2019)."""
    return (*range(depth), *range(depth))


def _one_shot(depth: int, first: int, full: int) -> Sources:
    """Expand once, to full depth (arXiv 2511.04981). Each layer keeps its relative depth, as in interleaved stacking.

    The order of the copies is a choice of this repository: the source at hand does not give it.
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
    """Consecutive steps of training at one depth."""

    first_step: int
    num_steps: int
    depth: int
    sources: Sources | None  # growth from the stage before; None for the first stage
    originals: tuple[int, ...]  # present position of each layer of the first stage


def plan_stages(config: StudentConfig) -> tuple[Stage, ...]:
    """Return the stages of a student: one for a family that does not grow.

    Raises RetortError if the method does not reach the depth from `growth.first`, or if a stage would have no step.
    """
    full = config.shape.layers
    if not config.grows:
        return (Stage(0, config.steps, full, None, tuple(range(full))),)
    method, first = config.family, config.growth.first
    if config.generation.grow_from is not None:  # the blocks that a gendistiller's layers share
        method, first = "interleaved", config.generation.grow_from
    tables = growth_tables(method, first, full)
    bounds = _bounds(config.growth, config.steps, len(tables) + 1)
    depth, originals = first, tuple(range(first))
    stages = [Stage(0, bounds[1], depth, None, originals)]
    for index, sources in enumerate(tables, start=1):
        originals = tuple(sources.index(position) for position in originals)  # an original precedes its clones
        stages.append(Stage(bounds[index], bounds[index + 1] - bounds[index], len(sources), sources, originals))
    if any(stage.num_steps < 1 for stage in stages):
        raise RetortError(
            f"steps: got {config.steps}, too few for the {len(tables) + 1} stages of {config.family}; raise `steps`"
        )
    return tuple(stages)


def growth_tables(method: Family, first: int, full: int) -> list[Sources]:
    """Return the sources of every growth from `first` layers to `full`. Raises RetortError if `full` is not reached."""
    tables: list[Sources] = []
    depths = [first]
    while 0 < depths[-1] < full:
        tables.append(METHODS[method](depths[-1], first, full))
        depths.append(len(tables[-1]))
        if depths[-1] == depths[-2]:
            break  # the method adds no layer at this depth
    if depths[-1] != full:
        raise RetortError(
            f"{method} from {first} layers has depths {', '.join(map(str, depths))}, expected to reach {full}; change "
            "shape.layers or growth.first (generation.grow_from of a gendistiller)"
        )
    return tables


def _bounds(config: GrowthConfig, steps: int, num_stages: int) -> list[int]:
    """Return the first steps of all stages, and the end.

    Of T steps stage i has the share p_i / Σ p_j. "equal" (EQL): p_i = 1. "proportional" (PROP-a of arXiv 2606.11766):
    p_i = i^a. "late": the first stage has `late_share`, the others share the rest.
    """
    if config.schedule == "late":
        rest = (1 - config.late_share) / max(1, num_stages - 1)
        parts = [config.late_share, *[rest] * (num_stages - 1)]
    else:
        exponent = config.exponent if config.schedule == "proportional" else 0.0
        parts = [float(index**exponent) for index in range(1, num_stages + 1)]
    return [round(steps * sum(parts[:index]) / sum(parts)) for index in range(num_stages + 1)]


def grow_layers(layers: nn.ModuleList, sources: Sources) -> nn.ModuleList:
    """Return the deeper stack. Originals stay the same modules; clones are deep copies with the present weights."""
    assert max(sources) < len(layers)
    return nn.ModuleList(
        layers[source] if sources.index(source) == position else copy.deepcopy(layers[source])
        for position, source in enumerate(sources)
    )


@torch.no_grad()
def make_clones_identities(layers: nn.ModuleList, sources: Sources) -> None:
    """Change a stack that has grown, in place, so that it computes what it did before growth.

    A post-LN block with W_o = W_2 = 0 (docs/methods.md, Clones) is LN(LN(h)). Its input is h = g x + b with x = norm of
    the block before, so the affine map g, b of that block's last norm moves to the clone's last norm, and the norms
    between have 1 and 0: the clone is LN(LN(x)) g + b = h. The next clone in a row takes g, b over.
    """
    for position in clones(sources):
        before, clone = layers[position - 1], layers[position]
        assert isinstance(before, TransformerLayer) and isinstance(clone, TransformerLayer)
        clone.final_layer_norm.load_state_dict(before.final_layer_norm.state_dict())
        for norm in (before.final_layer_norm, clone.layer_norm):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        for linear in (clone.attention.out_proj, clone.feed_forward.output_dense):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def drop_changed(values: dict[str, V], sources: Sources, *, prefix: str) -> None:
    """Remove, in place, values of the parameters that `make_clones_identities` sets; those of g, b move with them."""
    for position in clones(sources):
        before, clone = f"{prefix}{position - 1}.", f"{prefix}{position}."
        for kind in ("weight", "bias"):
            for part in ("attention.out_proj", "feed_forward.output_dense", "layer_norm"):
                values.pop(f"{clone}{part}.{kind}", None)
            values[f"{clone}final_layer_norm.{kind}"] = values.pop(f"{before}final_layer_norm.{kind}")


def clones(sources: Sources) -> list[int]:
    """Return the positions of the clones, ascending. The first position is never one."""
    return [position for position, source in enumerate(sources) if sources.index(source) != position]


def grow_mapping(values: Mapping[str, V], sources: Sources, *, prefix: str) -> dict[str, V]:
    """Return values by parameter name of the deeper model from those of the shallower one.

    `prefix` is the name prefix of the stack, e.g. "student.encoder.layers."; other names keep their value.
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
    """Return the position of the student's layer that is compared with teacher layer `layer` of `last`.

    Arguments:
        place: "block-end": the layer at the same relative depth, e.g. 4 of 12 -> 4 of 12 and 4 of 12 -> 1 of 3.
            "original": the layer at that relative depth in the first stage, wherever growth has moved it.
    Raises RetortError if no layer of the student has exactly this relative depth.
    """
    depth = stage.depth if place == "block-end" else stages[0].depth
    if layer * depth % last:
        raise RetortError(
            f"teacher layer {layer} of {last} has no counterpart in a student of {depth} layers; "
            "change targets, shape.layers or growth.first"
        )
    position = layer * depth // last - 1  # layers count from 1, positions from 0
    if position == depth - 1:
        return stage.depth - 1  # the teacher's last layer is always the student's last
    return position if place == "block-end" else stage.originals[position]
