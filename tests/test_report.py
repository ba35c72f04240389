"""The report: records that it reads and refuses, and its tables and sentences. All results here are invented."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from dvc.repo import Repo

from evaluate.table import TEST_SIZES, superb_s
from extract.base.errors import RetortError
from pipelines.report import report_command
from pipelines.report.command import read_config
from pipelines.report.published import PUBLISHED
from pipelines.report.results import Upstream, read_curve, read_results
from pipelines.report.table import Column
from tests.report_world import (
    FINGERPRINT,
    NOTE,
    PARAMS,
    STUDENTS,
    TASKS,
    TEN_TASKS,
    Made,
    Tables,
    change,
    invented_speed,
    made_in,
    score,
    svgs,
    write_results,
    write_tsv,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_results(tmp_path)
    return tmp_path


def metrics_in(folder: Path) -> dict[str, dict[str, float]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_metrics_hold_the_relative_score_and_flat_numbers(made: Made) -> None:
    rows = metrics_in(made.root / "metrics")
    assert rows.keys() == PARAMS.keys()
    for name, row in rows.items():
        shares = [(tests[name] - tests["fbank"]) / (tests["teacher"] - tests["fbank"]) for *_, tests in TASKS.values()]
        assert row.pop("score") == pytest.approx(250 * sum(shares), abs=0.051)
        if name in STUDENTS:
            assert row.pop("dev_loss") == 0.47
        scores = {task: tests[name] for task, (_, _, tests) in TASKS.items()}
        assert row == scores | {"params_m": pytest.approx(PARAMS[name] / 1e6, abs=5.1e-4)}


def test_metrics_are_one_table_in_git_that_dvc_compares_with_any_commit(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]
    stage = stage | {"deps": ["scores"], "cmd": stage["cmd"].replace("python", sys.executable, 1)}
    (tree / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"report": stage}}))
    shutil.copy(ROOT / ".gitignore", tree)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def git(*arguments: str) -> str:
        me = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        return subprocess.run(["git", *me, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    with Repo.init(str(tree)) as repo:
        repo.reproduce()
    git("add", "--all")
    git("commit", "--quiet", "--message", "claim")
    with Repo(str(tree)) as repo:
        assert repo.reproduce() == [] and git("status", "--porcelain") == ""
        shown = repo.metrics.show()[""]["data"]
        assert shown == {f"metrics/{name}.json": {"data": row} for name, row in metrics_in(tree / "metrics").items()}
        change(tree / "scores/demo-layerwise/ks.json", test=88.0)
        repo.reproduce()
        changed = repo.metrics.diff()["diff"]
    assert changed.keys() == {"metrics/demo-layerwise.json"}
    assert changed["metrics/demo-layerwise.json"]["ks"] == {"old": 92.0, "new": 88.0, "diff": -4.0}
    assert changed["metrics/demo-layerwise.json"].keys() == {"ks", "score"}
    params = yaml.safe_load((tree / "params.yaml").read_text())
    del params["upstreams"]["demo-layerwise"]
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    report_of(tree, [name for name in STUDENTS if name != "demo-layerwise"], ["ks"], monkeypatch)
    assert metrics_in(tree / "metrics").keys() == PARAMS.keys() - {"demo-layerwise"}


def test_a_folder_of_other_files_is_not_replaced_by_metrics(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    done = CliRunner().invoke(report_command, ["--metrics", "runs"])
    assert isinstance(done.exception, RetortError) and "--metrics runs is a folder without teacher.json" in str(
        done.exception
    )
    assert (tree / "runs/demo-layerwise/metrics.json").is_file() and not (tree / "report").exists()


def test_students_are_ranked_with_their_scores(made: Made) -> None:
    markdown = (made.root / "report/results.md").read_text()
    scores = {
        "demo-interleaved": "860",
        "demo-layerwise": "826",
        "demo-distilhubert": "707",
        "demo-gendistiller": "−49",
    }
    ranked = [part for pair in scores.items() for part in pair]
    for whole in (re.sub(r"<[^>]+>", "", made.page), markdown):
        (sentence,) = set(re.findall(r"demo-interleaved came first.*", whole))
        places = [sentence.index(part) for part in ranked]
        assert places == sorted(places) and "worse than fbank" in sentence
    assert NOTE in markdown
    assert "heads of seeds 7, 8 and 9" in markdown and "400 steps instead of 200,000" in markdown
    # Others lie inside the intervals of the first, so that no score is bold.
    assert "| demo-interleaved | student | 860 | 20.40 ± 0.5 | 31.20 ± 0.5 | 91.40 ± 0.5 | 83.00 ± 0.5 |" in markdown
    assert "| chance |  |  | 12.50 | 12.50 | 12.50 | 12.50 |" in markdown
    assert "Best student by task" not in markdown


def test_the_terminal_shows_the_table_whole_even_on_a_narrow_terminal(made: Made) -> None:
    lines = made.terminal.splitlines()
    number, line = next((n, line) for n, line in enumerate(lines) if line.startswith("demo-gendistiller"))
    assert lines[number + 1].split() == ["±0.5"] * 4
    assert re.fullmatch(r"\[[\d.]+\]", lines[number + 2].split()[0])  # half the interval of the relative score
    assert lines[number + 2].split()[1:] == ["[3.0]"] * 4
    assert line.split() == [
        "demo-gendistiller",
        "student",
        "−49",
        "57.00",
        "66.00",
        "60.10",
        "44.00",
        "0.60",
        "2.42",
        "0.06",
        "285",
    ]
    assert any(line.startswith("demo-interleaved came first") for line in lines)
    assert NOTE in lines


@pytest.mark.parametrize(
    "gone",
    [
        "manifests/targets/distill.json",
        "students/demo-layerwise/config.json",
        "runs/demo-gendistiller/metrics.json",
        "scores/fbank/ks.json",
    ],
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(tree: Path, gone: str) -> None:
    (tree / gone).unlink()
    with pytest.raises(RetortError, match=f"{gone} does not exist.*dvc repro"):
        read_results(tree, STUDENTS, TASKS)


def test_results_that_do_not_belong_together_are_refused(tree: Path) -> None:
    change(tree / "runs/demo-layerwise/metrics.json", teacher="another")
    with pytest.raises(RetortError, match=r"demo-layerwise .* teacher store another"):
        read_results(tree, STUDENTS, TASKS)
    # The store of dev counts: targets may come from one in another codec.
    change(tree / "runs/demo-layerwise/metrics.json", dev_teacher=FINGERPRINT)
    runs = {upstream.name: run for upstream, run in read_results(tree, STUDENTS, TASKS).students}
    assert (runs["demo-layerwise"].teacher, runs["demo-layerwise"].dev_teacher) == ("another", FINGERPRINT)
    change(tree / "runs/demo-layerwise/metrics.json", teacher=FINGERPRINT, dev_teacher="another")
    with pytest.raises(RetortError, match=r"demo-layerwise .* teacher store another"):
        read_results(tree, STUDENTS, TASKS)
    change(tree / "runs/demo-layerwise/metrics.json", dev_teacher=None)
    change(tree / "scores/fbank/sid.json", labels_digest="another")
    with pytest.raises(RetortError, match="labels_digest"):
        read_results(tree, STUDENTS, TASKS)


def test_a_damaged_score_is_named_with_its_field(tree: Path) -> None:
    change(tree / "scores/teacher/pr.json", chosen_lr="fast")
    with pytest.raises(RetortError, match=r"teacher/pr\.json: chosen_lr: got 'fast', expected float"):
        read_results(tree, STUDENTS, TASKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": {"offical": True}}, "report 'offical': expected one of official, speed"),
        ({"report": {"official": "yes"}}, "report.official: got 'yes', expected bool"),
        ({"students": "all"}, "`students` is 'all', expected a list of names"),
        ({"report": None}, "has no section `report`"),
        ({"upstreams": ["fbank"]}, "has no section `upstreams`"),
    ],
)
def test_params_are_parsed_strictly(tree: Path, change: dict[str, object], message: str) -> None:
    params = yaml.safe_load((tree / "params.yaml").read_text())
    (tree / "params.yaml").write_text(yaml.safe_dump(params | change))
    with pytest.raises(RetortError, match=re.escape(message)):
        read_config(tree / "params.yaml")


def test_a_curve_is_read_as_dvclive_writes_it(tmp_path: Path) -> None:
    write_tsv(tmp_path / "loss.tsv", [(0, 1.5), (10, 0.25)])
    assert read_curve(tmp_path / "loss.tsv") == [(0, 1.5), (10, 0.25)]
    assert read_curve(tmp_path / "never-logged.tsv") == []
    (tmp_path / "loss.tsv").write_text("step\tother\n0\t1\n")
    with pytest.raises(RetortError, match="columns step and loss"):
        read_curve(tmp_path / "loss.tsv")


@pytest.mark.parametrize(
    ("dev", "fall"),
    [
        ([(65, 1.5), (325, 1.0), (390, 0.75)], 0.25),
        ([(300, 2.0), (350, 1.5), (390, 1.0)], 0.5),  # of the last point before the last sixth
        ([(390, 1.0)], None),
        ([], None),
    ],
)
def test_the_fall_of_the_loss_in_the_last_sixth(dev: list[tuple[int, float]], fall: float | None) -> None:
    upstream = Upstream(name="student", kind="student", scores={}, relative=None, curves={"dev/loss": dev})
    assert upstream.last_fall == fall


def report_of(tree: Path, students: list[str], tasks: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    params = yaml.safe_load((tree / "params.yaml").read_text())
    params |= {"students": students, "tasks": {"speech": tasks, "emotions": ["er"]}}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tree)
    result = CliRunner().invoke(report_command, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_report_without_a_scale_has_its_other_parts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(tree / "scores/fbank/asr.json", test=25.0)
    change(tree / "runs/demo-layerwise/metrics.json", loss={"train": 0.4, "dev": None, "dev_stored_stem": None})
    shutil.rmtree(tree / "runs/demo-layerwise/plots")
    output = report_of(tree, ["demo-layerwise"], ["asr"], monkeypatch)
    assert "on no task is the teacher better than fbank" in output
    assert metrics_in(tree / "metrics")["teacher"] == {"asr": 25.0, "params_m": 4.1}
    assert "on no task is the teacher better than fbank" in (tree / "report/results.md").read_text()
    assert len(list(svgs((tree / "report/index.html").read_text()))) == 2  # training and search, no trade-offs


def test_a_task_of_ones_own_is_a_column_of_the_results(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tree / "scores").glob("*/asr.json"):
        change(path, task="lid", metric="acc")
        path.rename(path.with_name("lid.json"))
    report_of(tree, list(STUDENTS), ["ks", "lid"], monkeypatch)
    assert metrics_in(tree / "metrics")["teacher"]["lid"] == TASKS["asr"][2]["teacher"]
    assert metrics_in(tree / "metrics")["teacher"]["score"] == 1000


def test_a_report_needs_no_students(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No student is configured" in report_of(tree, [], ["ks"], monkeypatch)


def test_without_measurements_their_columns_are_absent_with_a_note(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(tree / "measures")
    output = report_of(tree, list(STUDENTS), list(TASKS), monkeypatch)
    page, markdown = ((tree / "report" / name).read_text() for name in ("index.html", "results.md"))
    for text in (output, page, markdown):
        assert "ot scored: ER (corpus emotions is not configured)" in text
    for text in (output, page, markdown):
        assert "run stage speed" in text and "× real time" not in text
    assert page.count("run stage compare@demo-") == len(STUDENTS)
    assert "params_m" not in metrics_in(tree / "metrics")["teacher"]
    assert len(Tables(page).tables[0][0]) == 2 + len(TASKS)  # upstream, relative score, tasks


def test_an_upstream_without_speed_has_empty_cells(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = invented_speed()
    upstreams = {name: one for name, one in made.upstreams.items() if name != "demo-layerwise"}
    replace(made, upstreams=upstreams).write(tree / "measures/speed.json")
    assert "no speed of demo-layerwise" in report_of(tree, list(STUDENTS), list(TASKS), monkeypatch)
    (row,) = re.findall(r"\| demo-layerwise \| student .*", (tree / "report/results.md").read_text())[:1]
    assert row.endswith("| – | – | – | – |")


def test_a_comparison_of_another_store_is_left_out(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "copy")
    change(tmp_path / "copy/measures/compare/demo-layerwise.json", student_digest="99" * 32)
    results = read_results(tmp_path / "copy", STUDENTS, TASKS)
    compared = {one.name for one in results.upstreams if one.comparison}
    assert compared == STUDENTS.keys() - {"demo-layerwise"}
    assert any("demo-layerwise.json is out of date" in note for note in results.measure_notes)


def test_any_other_upstream_is_a_row(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, (metric, higher, _) in TASKS.items():
        copied = replace(score(task, metric, higher, "teacher", 77.0), upstream="published")
        copied.write(tree / f"scores/published/{task}.json")
    params = yaml.safe_load((tree / "params.yaml").read_text())
    params["upstreams"]["published"] = {"source": "someone/published"}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    assert "| published | model |" in report_of_markdown(tree, monkeypatch)


def report_of_markdown(tree: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    report_of(tree, list(STUDENTS), list(TASKS), monkeypatch)
    return (tree / "report/results.md").read_text()


def test_a_report_is_rendered_without_torch(tree: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipelines.report.command import make_report, read_config\n"
        "root = Path(sys.argv[1]); make_report(root, read_config(root / 'params.yaml'), root / 'out', root / 'm')\n"
        "print('loaded:', sorted({'torch', 'torchaudio', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tree)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("loaded: []\n"), done.stderr
    assert (tree / "out/index.html").is_file()


def test_every_score_has_its_interval(made: Made) -> None:
    markdown = (made.root / "report/results.md").read_text()
    # half the width of the test set's part
    caveat = "about ± 2.8 on PR (320), 2.8 on ASR (320), 2.8 on KS (320) and 2.8 on SID (320): points"
    line = (
        r"\| demo-interleaved \| 860 \(\d+–\d+\) \| 20.40 ± 0.50 \(17.15–23.15\) "
        r"\| 31.20 ± 0.50 \(27.95–33.95\) \| 12.50 ± 0.50 \|"
    )
    for text in (markdown, made.page):
        assert caveat in text
    assert re.search(line, markdown) and "20.40 ± 0.50 (17.15–23.15)" in made.page
    assert "| upstream | relative score | PR PER % ↓ | ASR WER % ↓ | ASR CER |" in markdown


def test_students_of_one_score_are_not_the_best_where_it_has_an_interval() -> None:
    upstreams = [Upstream(name=name, kind="student", scores={}, relative=100.0) for name in ("one", "two")]
    upstreams.append(Upstream(name="three", kind="student", scores={}, relative=90.0))
    scored = Column("ASR", "WER % ↓", "high", lambda one: one.relative, "{:.1f}".format, lambda _: (100.0, 100.0))
    assert scored.best(upstreams) == frozenset()
    assert scored.best(upstreams[1:]) == {"two"}
    assert replace(scored, interval=lambda _: None).best(upstreams) == {"one", "two"}  # as parameters


def test_a_score_beyond_the_interval_is_bold(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree / "scores/demo-interleaved/pr.json"
    interval = json.loads(path.read_text())["interval"]
    change(path, test=16.0, interval=interval | {"test": [13.0, 21.8]})
    assert "| **16.00 ± 0.5** |" in report_of_markdown(tree, monkeypatch)
    assert "beyond its interval: demo-interleaved on PR." in (tree / "report/results.md").read_text()
    change(path, interval=interval | {"test": [13.0, 21.9]})  # demo-layerwise has 21.9
    assert "| 16.00 ± 0.5 |" in report_of_markdown(tree, monkeypatch)


def test_scores_of_other_corpora_are_not_compared_with_published_models(ten: Made) -> None:
    for text in (ten.page, (ten.root / "report/results.md").read_text()):
        assert "official: true" in text and "DPHuBERT" not in text


def test_official_scores_are_compared_with_published_models(tmp_path: Path) -> None:
    path = write_results(tmp_path, TEN_TASKS)
    params = yaml.safe_load(path.read_text())
    params["report"]["official"] = True
    path.write_text(yaml.safe_dump(params))
    with pytest.raises(RetortError, match="teacher, pr: 320 test utterances, expected the 2620 of SUPERB"):
        read_results(tmp_path, STUDENTS, TEN_TASKS, official=True)
    for task, size in TEST_SIZES.items():
        for name in PARAMS:
            change(tmp_path / "scores" / name / f"{task}.json", num_test=size)
    (table,) = [table for table in Tables(made_in(tmp_path).page).tables if "superb_s" in table[0]]
    names = [line[0] for line in table[1:]]
    assert set(names) == {*PARAMS, *PUBLISHED}
    scores = [float(line[2].replace("−", "-")) for line in table[1:]]
    assert scores == sorted(scores, reverse=True)
    assert table[1 + names.index("DPHuBERT")][2] == "866" and table[1 + names.index("HuBERT Base")][2] == "941"
    teacher = {task: tests["teacher"] for task, (_, _, tests) in TEN_TASKS.items() if task != "sf"}
    teacher |= {"sf_f1": TEN_TASKS["sf"][2]["teacher"], "sf_cer": 110 - TEN_TASKS["sf"][2]["teacher"]}
    assert scores[names.index("teacher")] == pytest.approx(superb_s(teacher), abs=0.5)


def test_part_of_the_tasks_is_compared_with_published_models_without_superb_s(tmp_path: Path) -> None:
    path = write_results(tmp_path)
    params = yaml.safe_load(path.read_text())
    params["report"]["official"] = True
    path.write_text(yaml.safe_dump(params))
    for task in TASKS:
        for name in PARAMS:
            change(tmp_path / "scores" / name / f"{task}.json", num_test=TEST_SIZES[task])
    (table,) = [table for table in Tables(made_in(tmp_path).page).tables if "superb_s" in table[0]]
    assert table[0] == ["model", "M", "superb_s", "PR", "ASR", "KS", "SID"]
    assert [line[2] for line in table[1:]].count("–") == len(PARAMS)
