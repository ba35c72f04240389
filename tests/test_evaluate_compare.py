"""`evaluate compare`: tolerances, missing scores, other recipes and test sets, and the claimed metrics of git."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evaluate.__main__ import main
from evaluate.compare import TOLERANCES, compare_scores
from evaluate.jobs import configure_torch, job_of, score
from evaluate.scorefile import ScoreFile
from extract.base.errors import RetortError
from extract.base.files import write_json
from tests.evaluate_stores import class_corpus, make_store
from tests.report_world import STUDENTS, TEN_TASKS, change
from tests.report_world import score as invented

HALF_WIDTH = 3.0  # of every invented score


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Return the scores of three upstreams on ten tasks, twice."""
    for side in "ab":
        for task, (metric, higher, tests) in TEN_TASKS.items():
            for name in ("teacher", "demo-layerwise", "fbank"):
                made = invented(task, metric, higher, name, tests[name])
                made.write(tmp_path / side / name / f"{task}.json")
    return tmp_path / "a", tmp_path / "b"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def verdicts(output: str) -> dict[tuple[str, str], str]:
    """Return the verdict of each row of the table, by upstream and task."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line[:1] == "│"]
    return {(row[0], row[1]): row[-1] for row in rows}


def test_equal_scores_are_within(sides: tuple[Path, Path]) -> None:
    done = run(*sides)
    assert done.exit_code == 0
    assert set(verdicts(done.output).values()) == {"within"} and len(verdicts(done.output)) == 30
    assert {row.difference for row in compare_scores(*sides, {})} == {0.0}


@pytest.mark.parametrize("task", TEN_TASKS)
@pytest.mark.parametrize("direction", [-1, 1])
def test_a_tolerance_is_a_multiple_of_the_interval(sides: tuple[Path, Path], task: str, direction: int) -> None:
    path = sides[1] / "teacher" / f"{task}.json"
    before, limit = ScoreFile.read(path), TOLERANCES[task] * HALF_WIDTH
    replace(before, test=before.test + direction * (limit - 0.01)).write(path)
    assert run(*sides).exit_code == 0
    replace(before, test=before.test + direction * (limit + 0.01)).write(path)
    done = run(*sides)
    assert done.exit_code == 1
    assert [row for row, verdict in verdicts(done.output).items() if verdict != "within"] == [("teacher", task)]
    assert run(*sides, "--tolerance", f"{task}={limit + 1}").exit_code == 0
    assert run(*sides, "--tolerance", "pr=0", "--tolerance", f"{task}={limit}").exit_code == 1


def test_every_task_has_a_tolerance_and_a_perfect_score_too(sides: tuple[Path, Path]) -> None:
    assert TOLERANCES.keys() == TEN_TASKS.keys()
    for side, test in zip(sides, (100.0, 99.6), strict=True):
        made = ScoreFile.read(side / "teacher/ks.json")
        interval = replace(made.interval, test=(test, test))  # of a single point
        replace(made, test=test, interval=interval).write(side / "teacher/ks.json")
    assert run(*sides).exit_code == 0
    change(sides[1] / "teacher/ks.json", test=99.4)
    assert run(*sides).exit_code == 1


def test_a_score_on_one_side_is_listed_and_is_no_failure(sides: tuple[Path, Path]) -> None:
    shutil.rmtree(sides[0] / "fbank")
    (sides[1] / "teacher/ks.json").unlink()
    done = run(*sides)
    assert done.exit_code == 0 and "11 on one side only" in done.output
    found = verdicts(done.output)
    assert found["teacher", "ks"] == "only in A" and found["fbank", "pr"] == "only in B"
    shutil.rmtree(sides[1] / "teacher")
    shutil.rmtree(sides[1] / "demo-layerwise")
    with pytest.raises(RetortError, match="no score in common"):
        compare_scores(*sides, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", {"steps": 401}),
        ("seed", 8),
        ("corpus_digest", "00" * 32),
        ("labels_digest", "00" * 32),
    ],
)
def test_another_recipe_or_test_set_is_named_and_fails(sides: tuple[Path, Path], field: str, value: object) -> None:
    for name in ("teacher", "demo-layerwise", "fbank"):
        change(sides[1] / name / "pr.json", **{field: value})
    done = run(*sides)
    assert done.exit_code == 1 and "3 not comparable" in done.output
    assert {verdicts(done.output)[name, "pr"] for name in ("teacher", "fbank")} == {f"differs in {field}"}


def test_memory_of_a_recipe_is_not_part_of_a_comparison(sides: tuple[Path, Path]) -> None:
    for name in ("teacher", "demo-layerwise", "fbank"):
        change(sides[1] / name / "pr.json", recipe={"steps": 400, "memory_gb": 4.0})
    assert run(*sides).exit_code == 0


def claim(folder: Path, **others: float) -> Path:
    """Write metrics as the report does, of teacher and student; `others` are changes of the student's."""
    for name in ("teacher", "demo-layerwise"):
        figures = {task: tests[name] for task, (_, _, tests) in TEN_TASKS.items()} | {"score": 900.0, "params_m": 4.1}
        write_json(folder / f"{name}.json", figures | (others if name in STUDENTS else {}))
    return folder


def test_claimed_metrics_are_compared_with_score_files(sides: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(claim(tmp_path / "claimed"), sides[1])
    assert done.exit_code == 0 and "20 scores compared" in done.output
    limit = TOLERANCES["ks"] * HALF_WIDTH
    claimed = claim(tmp_path / "claimed", ks=TEN_TASKS["ks"][2]["demo-layerwise"] + limit + 0.01)
    for pair in ((claimed, sides[1]), (sides[1], claimed)):
        done = run(*pair)
        assert done.exit_code == 1
        assert [row for row, verdict in verdicts(done.output).items() if verdict == "outside"] == [
            ("demo-layerwise", "ks")
        ]


def test_metrics_alone_need_tolerances(tmp_path: Path) -> None:
    first, second = claim(tmp_path / "one"), claim(tmp_path / "two", ks=91.0)
    with pytest.raises(RetortError, match=r"give a folder of score files.*--tolerance asr=POINTS for asr, asv"):
        compare_scores(first, second, {})
    wide = [option for task in TEN_TASKS for option in ("--tolerance", f"{task}=1")]
    assert run(first, second, *wide).exit_code == 0  # 92 and 91
    assert run(first, second, *wide, "--tolerance", "ks=0.9").exit_code == 1


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("kws=3", "task in --tolerance kws=3: 'kws'"),
        ("ks", "--tolerance ks: got '', expected TASK=POINTS"),
        ("ks=-1", "got '-1'"),
        ("ks=nan", "got 'nan'"),
    ],
)
def test_a_wrong_tolerance_is_one_line(sides: tuple[Path, Path], pair: str, message: str) -> None:
    done = run(*sides, "--tolerance", pair)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_folder_without_scores_and_a_damaged_metric_are_named(sides: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetortError, match=r"no score files in .*empty"):
        compare_scores(tmp_path / "empty", sides[1], {})
    claimed = claim(tmp_path / "claimed")
    change(claimed / "teacher.json", ks="high")
    with pytest.raises(RetortError, match=r"teacher\.json: ks: got 'high', expected float"):
        compare_scores(claimed, sides[1], {})


def test_scores_that_are_made_again_are_equal_and_another_seed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    card, hidden = class_corpus(tmp_path)
    manifest = make_store(tmp_path / "store", card, hidden)
    configure_torch()
    for side, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = {"ks": {"learning_rates": [1e-2], "steps": 20, "dev_evaluations": 2, "seed": seed}}
        out = tmp_path / side / "one/ks.json"
        score(job_of("ks", settings, None, upstream="one", manifest=manifest, corpus=card, out=out))
    (row,) = compare_scores(tmp_path / "a", tmp_path / "b", {"ks": 0.0})
    assert (row.difference, row.verdict) == (0.0, "within")
    (row,) = compare_scores(tmp_path / "a", tmp_path / "c", {})
    assert row.failed and set(re.findall(r"\w+", row.verdict)) == {"differs", "in", "recipe", "seed"}
    made = json.loads((tmp_path / "a/one/ks.json").read_text())
    low, high = made["interval"]["test"]
    assert row.tolerance is not None and row.tolerance >= (high - low) / 2 * TOLERANCES["ks"]
