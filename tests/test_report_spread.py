"""Students that differ in their seed alone become one line with mean and standard deviation."""

import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipelines.report import report_command, speed
from pipelines.report.results import read_results
from pipelines.report.speed import Speed
from pipelines.report.spread import find_repeats, spread_cell, spread_columns
from pipelines.report.table import make_columns, make_rows
from pipelines.report.words import verdict
from tests.report_world import TASKS, change, invented_speed, write_results

SEEDS = {1: 20.0, 2: 23.0, 4: 21.5}  # seed -> phone error rate


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """demo-layerwise with three seeds, and once more with another setting."""
    write_results(tmp_path)
    for seed, per in SEEDS.items():
        copy_student(tmp_path, f"deep-s{seed}", seed=seed, per=per, config={"steps": 360, "seed": seed})
    copy_student(tmp_path, "deep-s9", seed=9, per=50.0, config={"steps": 100, "seed": 9})
    return tmp_path


def copy_student(root: Path, name: str, *, seed: int, per: float, config: dict[str, int]) -> None:
    for folder in ("students", "runs", "scores"):
        shutil.copytree(root / folder / "demo-layerwise", root / folder / name)
    change(root / "runs" / name / "metrics.json", seed=seed, config=config, student=name)
    for task in TASKS:
        change(root / "scores" / name / f"{task}.json", upstream=name, **({"test": per} if task == "pr" else {}))


def speed_of(students: list[str]) -> Speed:
    made = invented_speed()
    for name in students:
        made.rtf[name], made.params[name], made.macs_per_audio_s[name] = 0.004, 963_040, 5_000_000
    return made


def test_seeds_of_one_setting_are_one_line_with_their_spread(tree: Path) -> None:
    students = ["demo-distilhubert", *(f"deep-s{seed}" for seed in (*SEEDS, 9))]
    results = read_results(tree, students, TASKS)
    rows, columns = make_rows(results, speed_of(students)), make_columns(results)
    (deep,) = find_repeats(rows)
    assert deep.name == "deep"
    assert [row.name for row in deep.rows] == ["deep-s1", "deep-s2", "deep-s4"]
    cells = {column.title: spread_cell(deep, column) for column in spread_columns(columns, [deep])}
    mean, deviation = statistics.mean(SEEDS.values()), statistics.stdev(SEEDS.values())
    assert cells["PR"] == f"{mean:.2f} ± {deviation:.2f}" == "21.50 ± 1.50"
    assert cells["KS"].endswith("± 0.00")
    assert "speed" not in cells and "dev loss" in cells
    assert [cells[f"layer {layer}"] for layer in (4, 8, 12)] == ["0.200 ± 0.000"] * 3


def test_a_student_of_several_seeds_wins_or_loses_by_their_mean(tree: Path) -> None:
    students = ["demo-distilhubert", *(f"deep-s{seed}" for seed in SEEDS)]
    rows = make_rows(read_results(tree, students, TASKS), speed_of(students))
    relative = {row.name: row.relative or 0.0 for row in rows}
    deep = [relative[name] for name in students[1:]]
    mean, deviation = statistics.mean(deep), statistics.stdev(deep)
    assert max(deep) > mean > relative["demo-distilhubert"]
    assert verdict(rows) == (
        f"deep came first with a relative score of {mean:.0f} ± {deviation:.0f} (fbank 0, teacher 1000); "
        f"demo-distilhubert ({relative['demo-distilhubert']:.0f}) lost to it; ± is over seeds."
    )


def test_the_spread_is_printed_and_stands_on_the_page(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students = [f"deep-s{seed}" for seed in SEEDS]
    params = yaml.safe_load((tree / "params.yaml").read_text()) | {"students": students}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tree)
    monkeypatch.setattr(speed, "measure_speed", lambda *args, **kwargs: speed_of(students))
    done = CliRunner().invoke(report_command, catch_exceptions=False)
    assert done.exit_code == 0
    for text in (done.output, *((tree / "report" / name).read_text() for name in ("results.md", "index.html"))):
        assert "21.50 ± 1.50" in text
        assert "no spread over seeds is known" not in text
