"""Graph of the pipeline: the stages of dvc.yaml and their order, laid out for one SVG.

DVC reads the stages and finds the edges; grandalf, the layout library of `dvc dag`, places them in layers (Sugiyama).
The stages of one `foreach` or `matrix` are one box with their number. Units are CSS pixels at full size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from extract.base.errors import RetortError

BOX_HEIGHT, ROW_GAP, COLUMN_GAP = 34, 28, 14
LETTER, PADDING = 6.9, 22  # widths of a letter at 12.5 px and of a box's margins
ARROW = 5  # length of an arrow head, which the line leaves free


@dataclass(frozen=True)
class Stage:
    """One stage, or all stages of one `foreach` or `matrix`; `needs` are the stages that it depends on."""

    name: str
    count: int
    description: str
    needs: tuple[str, ...]

    @property
    def label(self) -> str:
        """Text of the box."""
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
    """Return the stages of the dvc.yaml in `root`, each after those it needs; none without a DVC repository.

    Raises RetortError if DVC can't read dvc.yaml.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            # Stages of a foreach or matrix are named NAME@ITEM.
            file = str((root / "dvc.yaml").resolve())  # the index also has the stages of studies
            found = {
                stage: stage.name.partition("@")[0]
                for stage in repo.index.graph
                if getattr(stage, "name", None) and stage.path == file
            }
            edges = [(found[one], found[need]) for one, need in repo.index.graph.edges if {one, need} <= found.keys()]
            described = {name: stage.desc or "" for stage, name in found.items()}
    except NotDvcRepoError:
        return ()
    except DvcException as error:
        raise RetortError(f"dvc.yaml can't be read: {error}; run `dvc dag` for details") from None
    counts = Counter(found.values())
    needs = {name: sorted({need for one, need in edges if one == name != need}) for name in sorted(counts)}
    order = TopologicalSorter(needs).static_order()
    return tuple(Stage(name, counts[name], described[name], tuple(needs[name])) for name in order)


def draw_stages(stages: Sequence[Stage]) -> Drawing:
    """Lay out the stages from top to bottom. An edge that follows from others is left out."""
    from grandalf.graphs import Edge, Graph, Vertex
    from grandalf.layouts import SugiyamaLayout

    vertices = {stage.name: Vertex(stage) for stage in stages}
    for stage in stages:
        vertices[stage.name].view = _VertexView(LETTER * len(stage.label) + PADDING)
    edges = [Edge(vertices[need], vertices[name]) for need, name in direct_edges(stages)]
    for edge in edges:
        edge.view = _EdgeView()
    boxes: list[Box] = []
    paths: list[list[tuple[float, float]]] = []
    left = 0.0
    for part in Graph(list(vertices.values()), edges).C:  # connected parts stand side by side
        layout = SugiyamaLayout(part)
        layout.xspace, layout.yspace = COLUMN_GAP, ROW_GAP
        layout.init_all()
        layout.draw(3)  # sweeps that move boxes towards their neighbours; more change nothing for such small graphs
        placed = [(vertex.data, *vertex.view.xy, vertex.view.w) for vertex in part.sV]
        start = min(x - width / 2 for _, x, _, width in placed)
        start = min([start, *(x for edge in part.sE for x, _ in edge.view.points)])  # edges may pass left of all boxes
        top = min(y for _, _, y, _ in placed) - BOX_HEIGHT / 2 - 1
        boxes += [Box(stage, x - start + left, y - top, width) for stage, x, y, width in placed]
        paths += [[(x - start + left, y - top) for x, y in edge.view.points] for edge in part.sE]
        left = max([box.x + box.width / 2 for box in boxes] + [x for path in paths for x, _ in path]) + COLUMN_GAP
    return Drawing(
        boxes=tuple(sorted(boxes, key=lambda box: [stage.name for stage in stages].index(box.stage.name))),
        arrows=tuple(sorted(_path(points) for points in paths)),  # grandalf keeps edges in sets
        width=left - COLUMN_GAP,
        height=max(box.y for box in boxes) + BOX_HEIGHT / 2 + 1,
    )


def direct_edges(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """Return the (need, stage) pairs that do not follow from others: the transitive reduction."""
    needs = {stage.name: set(stage.needs) for stage in stages}

    # recursion without a cache: a pipeline has about ten stages
    def reached(name: str) -> set[str]:
        return needs[name].union(*map(reached, needs[name]))

    implied = {name: set[str]().union(*map(reached, own)) for name, own in needs.items()}
    return sorted((need, name) for name, own in needs.items() for need in own - implied[name])


class _VertexView:
    """Size of a box, and its place, which grandalf sets."""

    def __init__(self, width: float) -> None:
        self.w, self.h = width, BOX_HEIGHT
        self.xy = (0.0, 0.0)


class _EdgeView:
    """Points of an edge, which grandalf sets: one in each row, from centre to centre."""

    points: Sequence[tuple[float, float]] = ()

    def setpath(self, points: Sequence[tuple[float, float]]) -> None:
        self.points = points


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Return a smooth line from the bottom of the first box, straight through each row between, to the last box."""
    (x, y), half = points[0], BOX_HEIGHT / 2
    y += half
    path = f"M{x:.1f} {y:.1f}"
    for number, (next_x, next_y) in enumerate(points[1:], 2):
        last = number == len(points)
        enter, leave = next_y - half - (ARROW if last else 0), next_y + half
        bend = (enter - y) / 2  # control points half-way: the curve leaves and enters vertically
        path += f"C{x:.1f} {y + bend:.1f} {next_x:.1f} {enter - bend:.1f} {next_x:.1f} {enter:.1f}"
        if not last:
            path += f"V{leave:.1f}"
        x, y = next_x, leave
    return path
