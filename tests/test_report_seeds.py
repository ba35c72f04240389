"""Students that differ in their seed alone are one row with mean and standard deviation."""

import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipelines.report import report_command
from pipelines.report.results import read_results
from pipelines.report.table import find_seed_groups, seed_table
from pipelines.report.text import ranking
from tests.report_world import TASKS, change, write_results

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


def test_seeds_of_one_setting_are_one_row_with_their_deviation(tree: Path) -> None:
    students = ["demo-distilhubert", *(f"deep-s{seed}" for seed in (*SEEDS, 9))]
    results = read_results(tree, students, TASKS)
    (deep,) = find_seed_groups(results)
    assert deep.name == "deep"
    assert [one.name for one in deep.upstreams] == ["deep-s1", "deep-s2", "deep-s4"]
    table = seed_table(results)
    assert table is not None and len(table.rows) == 1
    cells = {title: cell.text for (title, _), cell in zip(table.heads, table.rows[0], strict=True)}
    mean, deviation = statistics.mean(SEEDS.values()), statistics.stdev(SEEDS.values())
    assert cells["PR"] == f"{mean:.2f} ± {deviation:.2f}" == "21.50 ± 1.50"
    assert cells["student"] == "deep" and cells["seeds"] == "3"
    assert cells["KS"].endswith("± 0.00")
    assert "speed" not in cells and "dev loss" in cells
    assert [cells[f"layer {layer}"] for layer in (4, 8, 12)] == ["0.200 ± 0.000"] * 3


def test_students_of_a_codebook_have_columns_for_it(tree: Path) -> None:
    for seed in SEEDS:
        score = {"probe_mse": 0.4, "probe_accuracy": 0.5, "accuracy": 0.25 * seed}
        change(tree / "runs" / f"deep-s{seed}" / "metrics.json", codes_by_layer={"8": score}, dev_by_layer={})
    table = seed_table(read_results(tree, ["demo-distilhubert", *(f"deep-s{seed}" for seed in SEEDS)], TASKS))
    assert table is not None
    cells = {title: cell.text for (title, _), cell in zip(table.heads, table.rows[0], strict=True)}
    assert cells["layer 8, probed"] == "0.400 ± 0.000" and cells["layer 8, codes"] == "0.583 ± 0.382"
    assert not {"layer 8", "layer 4, probed"} & cells.keys()


def test_a_student_of_several_seeds_is_ranked_by_their_mean(tree: Path) -> None:
    students = ["demo-distilhubert", *(f"deep-s{seed}" for seed in SEEDS)]
    results = read_results(tree, students, TASKS)
    relative = {one.name: one.relative or 0.0 for one in results.upstreams}
    deep = [relative[name] for name in students[1:]]
    mean, deviation = statistics.mean(deep), statistics.stdev(deep)
    assert max(deep) > mean > relative["demo-distilhubert"]
    sentence = ranking(results)
    assert sentence.startswith(f"deep came first with a relative score of {mean:.0f} ± {deviation:.0f} ")
    assert f"demo-distilhubert ({relative['demo-distilhubert']:.0f})" in sentence


def test_deviations_are_in_the_terminal_in_markdown_and_on_the_page(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = [f"deep-s{seed}" for seed in SEEDS]
    params = yaml.safe_load((tree / "params.yaml").read_text()) | {"students": students}
    params["upstreams"] = {name: {"source": name} for name in ("fbank", "teacher", *students)}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tree)
    done = CliRunner().invoke(report_command, catch_exceptions=False)
    assert done.exit_code == 0
    for text in (done.output, *((tree / "report" / name).read_text() for name in ("results.md", "index.html"))):
        assert "21.50 ± 1.50" in text
        assert "variation between seeds is unknown" not in text
