"""The pipeline's graph: read by DVC, and laid out without overlaps."""

import itertools
import re
from pathlib import Path

import networkx as nx
import pytest
from dvc.repo import Repo

from extract.base.errors import RetortError
from pipelines.report.graph import BOX_HEIGHT, Drawing, Stage, direct_edges, draw_stages, read_stages

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, ...]:
    """Of this repository, as params.yaml is."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("dvc.yaml", "params.yaml"):
        (place / name).write_bytes((ROOT / name).read_bytes())
    Repo.init(str(place), no_scm=True).close()
    return read_stages(place)


def test_the_stages_of_this_repository_are_in_order_of_work_and_counted(stages: tuple[Stage, ...]) -> None:
    labels = [stage.label for stage in stages]
    assert labels[:2] == ["demo-data", "corpus × 10"] and labels[-1] == "report"
    assert {"extract-teacher", "train × 4", "extract × 6", "evaluate × 6", "speed", "compare × 4"} < set(labels)
    for number, stage in enumerate(stages):
        assert set(stage.needs) <= {before.name for before in stages[:number]}
        assert stage.description
    assert {"evaluate", "speed", "compare"} <= set(stages[-1].needs)


def boxes_of(drawing: Drawing) -> list[tuple[float, float, float, float]]:
    return [(box.x - box.width / 2, box.y - BOX_HEIGHT / 2, box.x + box.width / 2, box.y + BOX_HEIGHT / 2)
            for box in drawing.boxes]  # fmt: skip


def passes(arrow: str) -> list[tuple[float, float]]:
    """Return the ends of an arrow's curves: where it enters the rows between, and where it arrives."""
    ends = re.findall(r"C[-0-9.]+ [-0-9.]+ [-0-9.]+ [-0-9.]+ ([-0-9.]+) ([-0-9.]+)", arrow)
    return [(float(x), float(y)) for x, y in ends]


def check_drawing(drawing: Drawing) -> None:
    boxes = boxes_of(drawing)
    for left, top, right, bottom in boxes:
        assert left > -1e-6 and top >= 0 and right < drawing.width + 1e-6 and bottom <= drawing.height
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for arrow in drawing.arrows:
        for x, y in passes(arrow)[:-1]:  # between its ends an arrow crosses no box
            assert not any(left < x < right and top - 1 < y < bottom for left, top, right, bottom in boxes)


def test_boxes_and_arrows_do_not_overlap(stages: tuple[Stage, ...]) -> None:
    drawing = draw_stages(stages)
    check_drawing(drawing)
    assert len(drawing.arrows) == len(direct_edges(stages))
    assert drawing.width < 400  # a phone shows it at about full size


def graph_of(edges: str) -> list[Stage]:
    """Return stages in order of work, of edges such as `a>b`; a lone `a` without edges."""
    pairs = [edge.split(">") for edge in edges.split()]
    names = sorted({name for pair in pairs for name in pair} | {"a"})
    return [Stage(name, 1, "", tuple(one for one, other in pairs if other == name)) for name in names]


@pytest.mark.parametrize(
    "edges", ["", "a>b", "a>b b>c c>d a>d", "a>c b>c c>d c>e c>f d>g e>g a>g", "a>b c>d e>f", "a>f b>e c>d"]
)
def test_any_graph_is_laid_out(edges: str) -> None:
    drawing = draw_stages(graph_of(edges))
    check_drawing(drawing)
    assert drawing == draw_stages(graph_of(edges))


def test_edges_that_follow_from_others_are_left_out() -> None:
    stages = graph_of("a>b b>c c>d a>d a>c d>e b>e a>e")
    expected = nx.transitive_reduction(nx.DiGraph([(need, one.name) for one in stages for need in one.needs]))
    assert direct_edges(stages) == sorted(expected.edges) == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")]


def test_a_folder_without_a_pipeline_has_no_stages_and_a_broken_one_is_one_line(tmp_path: Path) -> None:
    assert read_stages(tmp_path) == ()
    Repo.init(str(tmp_path), no_scm=True).close()
    assert read_stages(tmp_path) == ()
    (tmp_path / "dvc.yaml").write_text("stages: {a: {command: x}}\n")
    with pytest.raises(RetortError, match=r"dvc\.yaml can't be read"):
        read_stages(tmp_path)
