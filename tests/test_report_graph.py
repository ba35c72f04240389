"""The pipeline's graph: read by DVC, laid out so that nothing lies on anything else."""

import itertools
import re
from pathlib import Path

import pytest
from dvc.repo import Repo

from extract.base.errors import RetortError
from pipelines.report.graph import BOX_HEIGHT, Drawing, Stage, draw_stages, read_stages

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
    assert labels[:2] == ["speak", "corpus × 10"] and labels[-2:] == ["score × 6", "report"]
    assert {"teach", "distil × 4", "features × 4", "features-teacher", "features-fbank"} < set(labels)
    for number, stage in enumerate(stages):
        assert set(stage.needs) <= {before.name for before in stages[:number]}
        assert stage.description
    assert stages[-1].needs == ("corpus", "distil", "features", "features-fbank", "features-teacher", "score", "teach")


def boxes_of(drawing: Drawing) -> list[tuple[float, float, float, float]]:
    return [(box.x - box.width / 2, box.y - BOX_HEIGHT / 2, box.x + box.width / 2, box.y + BOX_HEIGHT / 2)
            for box in drawing.boxes]  # fmt: skip


def passes(arrow: str) -> list[tuple[float, float]]:
    """The points in which the curves of an arrow end: before, where it enters a row on its way or arrives."""
    ends = re.findall(r"C[-0-9.]+ [-0-9.]+ [-0-9.]+ [-0-9.]+ ([-0-9.]+) ([-0-9.]+)", arrow)
    return [(float(x), float(y)) for x, y in ends]


def check_drawing(drawing: Drawing) -> None:
    boxes = boxes_of(drawing)
    for left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= drawing.width and bottom <= drawing.height
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for arrow in drawing.arrows:
        for x, y in passes(arrow)[:-1]:  # between its ends an arrow runs past boxes, through none
            assert not any(left < x < right and top - 1 < y < bottom for left, top, right, bottom in boxes)


def test_boxes_and_arrows_lie_on_no_other_box(stages: tuple[Stage, ...]) -> None:
    drawing = draw_stages(stages)
    check_drawing(drawing)
    assert len(drawing.arrows) == 10  # the others follow
    assert drawing.width < 400  # a phone shows it at about full size


def test_any_graph_is_laid_out(tmp_path: Path) -> None:
    for edges in ("", "a>b", "a>b b>c c>d a>d", "a>c b>c c>d c>e c>f d>g e>g a>g", "a>b c>d e>f", "a>f b>e c>d"):
        pairs = [edge.split(">") for edge in edges.split()]
        names = sorted({name for pair in pairs for name in pair} | {"a"})
        stages = [Stage(name, 1, "", tuple(one for one, other in pairs if other == name)) for name in names]
        drawing = draw_stages(stages)
        check_drawing(drawing)
        assert drawing == draw_stages(stages)


def test_a_folder_without_a_pipeline_has_no_stages_and_a_broken_one_is_one_line(tmp_path: Path) -> None:
    assert read_stages(tmp_path) == ()
    Repo.init(str(tmp_path), no_scm=True).close()
    assert read_stages(tmp_path) == ()
    (tmp_path / "dvc.yaml").write_text("stages: {a: {command: x}}\n")
    with pytest.raises(RetortError, match=r"dvc\.yaml can't be read"):
        read_stages(tmp_path)
