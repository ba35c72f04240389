"""The pipeline's graph as `dvc.yaml` has it now: which stage follows from which, laid out for one drawing in SVG.

DVC reads the stages and finds the arrows; those of one `foreach` or `matrix` become one box with their number. The
layout is Sugiyama's: a row for every distance to the end, arrows that pass a row keep a place in it, and every row is
ordered by the places of what its boxes lead to. Units are those of the drawing, CSS pixels at full size.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import networkx as nx

from extract.base.errors import RetortError

BOX_HEIGHT, ROW_HEIGHT = 34, 62
LETTER, PADDING, GAP, LANE = (
    6.9,
    22,
    14,
    26,
)  # widths: of a letter at 12.5 px, a box's margins, between boxes, of an arrow

Node = str | tuple[str, str, int]  # a stage, or the place that an arrow keeps in a row it passes


@dataclass(frozen=True)
class Stage:
    """One stage, or all of one `foreach` or `matrix`; `needs` are the stages that it follows from."""

    name: str
    count: int
    description: str
    needs: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.name if self.count == 1 else f"{self.name} × {self.count}"


@dataclass(frozen=True)
class Box:
    """A stage in the drawing; x and y are its centre."""

    stage: Stage
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Drawing:
    """Boxes, and arrows as SVG paths."""

    boxes: tuple[Box, ...]
    arrows: tuple[str, ...]
    width: float
    height: float
    box_height: int = BOX_HEIGHT


def read_stages(root: Path) -> tuple[Stage, ...]:
    """The stages of the DVC repository that `root` belongs to, in order of work; none where it belongs to none.

    Raises RetortError for stages that DVC can't read.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            found = {stage: stage.name.partition("@")[0] for stage in repo.index.graph if getattr(stage, "name", None)}
            arrows = [(found[need], found[one]) for one, need in repo.index.graph.edges if {one, need} <= found.keys()]
            described = {name: stage.desc or "" for stage, name in found.items()}
    except NotDvcRepoError:
        return ()
    except DvcException as error:
        raise RetortError(f"dvc.yaml can't be read: {error}; `dvc dag` says more") from None
    counts = Counter(found.values())
    graph: Any = nx.DiGraph()
    graph.add_nodes_from(sorted(counts))
    graph.add_edges_from((one, other) for one, other in arrows if one != other)
    return tuple(
        Stage(name, counts[name], described[name], tuple(sorted(graph.predecessors(name))))
        for name in nx.lexicographical_topological_sort(graph)
    )


def draw_stages(stages: Sequence[Stage]) -> Drawing:
    """Rows from top to bottom. An arrow that others imply is not drawn: a stage needs that one through them, too."""
    of_name = {stage.name: stage for stage in stages}
    graph: Any = nx.DiGraph()
    graph.add_nodes_from(of_name)
    graph.add_edges_from((need, stage.name) for stage in stages for need in stage.needs)
    graph = nx.transitive_reduction(graph)
    rows, chains = _rows(graph)
    widths: dict[Node, float] = {name: LETTER * len(stage.label) + PADDING for name, stage in of_name.items()}
    centres = _places(rows, chains, widths)
    left = min(centre - widths.get(node, 0) / 2 for node, centre in centres.items()) - 2
    right = max(centre + widths.get(node, 0) / 2 for node, centre in centres.items()) + 2
    at = {node: (centres[node] - left, number * ROW_HEIGHT + BOX_HEIGHT / 2 + 1) for number, row in enumerate(rows)
          for node in row}  # fmt: skip
    return Drawing(
        boxes=tuple(Box(stage, *at[name], widths[name]) for name, stage in of_name.items()),
        arrows=tuple(_path([at[node] for node in chain]) for chain in chains),
        width=right - left,
        height=(len(rows) - 1) * ROW_HEIGHT + BOX_HEIGHT + 2,
    )


def _rows(graph: Any) -> tuple[list[list[Node]], list[list[Node]]]:
    """Nodes by row, the first row on top, and every edge as the chain of nodes it passes, one a row."""
    height: dict[str, int] = {}
    for name in reversed(list(nx.lexicographical_topological_sort(graph))):
        height[name] = 1 + max((height[after] for after in graph.successors(name)), default=-1)
    top = max(height.values())
    rows: list[list[Node]] = [[] for _ in range(top + 1)]
    for name in sorted(graph.nodes):
        rows[top - height[name]].append(name)
    chains: list[list[Node]] = []
    for one, other in sorted(graph.edges):
        levels = range(height[one] - 1, height[other], -1)
        passed: list[Node] = [(one, other, level) for level in levels]
        for node, level in zip(passed, levels, strict=True):
            rows[top - level].append(node)
        chains.append([one, *passed, other])
    return rows, chains


def _places(
    rows: Sequence[list[Node]], chains: Sequence[Sequence[Node]], widths: Mapping[Node, float]
) -> dict[Node, float]:
    """The centre of every node: rows are swept up and down, each node drawn to the mean of what it is joined to."""
    above: dict[Node, list[Node]] = {}
    below: dict[Node, list[Node]] = {}
    for chain in chains:
        for one, other in pairwise(chain):
            below.setdefault(one, []).append(other)
            above.setdefault(other, []).append(one)
    wide = {node: widths.get(node, LANE) for row in rows for node in row}
    centres: dict[Node, float] = {}
    for row in rows:
        _pack(row, {node: float(place) for place, node in enumerate(row)}, wide, centres)
    for sweep in range(13):  # the last goes up, so that long arrows come straight down
        joined, order = (below, reversed(rows)) if sweep % 2 == 0 else (above, rows)
        for row in order:
            wanted = {
                node: mean(centres[other] for other in joined[node]) if node in joined else centres[node]
                for node in row
            }
            _pack(row, wanted, wide, centres)
    return centres


def _pack(
    row: list[Node],
    wanted: Mapping[Node, float],
    wide: Mapping[Node, float],
    centres: dict[Node, float],
) -> None:
    """Order a row by where its nodes want to be, and put them as near to that as their widths allow."""
    row.sort(key=lambda node: (wanted[node], str(node)))
    runs: list[tuple[list[Node], float]] = []  # nodes that touch, and the centre that suits them best
    for node in row:
        run, centre = [node], wanted[node]
        while runs and centre - _width(run, wide) / 2 < runs[-1][1] + _width(runs[-1][0], wide) / 2 + GAP:
            before, _ = runs.pop()
            run = before + run
            centre = mean(wanted[one] - offset for one, offset in _offsets(run, wide))
        runs.append((run, centre))
    for run, centre in runs:
        for node, offset in _offsets(run, wide):
            centres[node] = centre + offset


def _width(run: Sequence[Node], wide: Mapping[Node, float]) -> float:
    return sum(wide[node] for node in run) + GAP * (len(run) - 1)


def _offsets(run: Sequence[Node], wide: Mapping[Node, float]) -> list[tuple[Node, float]]:
    """Every node of a run with its distance from the run's centre."""
    found, edge = [], -_width(run, wide) / 2
    for node in run:
        found.append((node, edge + wide[node] / 2))
        edge += wide[node] + GAP
    return found


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line from the bottom of the first box through the rows between to the top of the last."""
    (x, y), half = points[0], BOX_HEIGHT / 2
    path, y = f"M{x:.1f} {y + half:.1f}", y + half
    for number, (next_x, next_y) in enumerate(points[1:], 2):
        last = number == len(points)
        enter, leave = next_y - half - (5 if last else 0), next_y + half
        bend = (enter - y) / 2
        path += f"C{x:.1f} {y + bend:.1f} {next_x:.1f} {enter - bend:.1f} {next_x:.1f} {enter:.1f}"
        if not last:
            path += f"V{leave:.1f}"
        x, y = next_x, leave
    return path
