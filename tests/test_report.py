"""The report: what it reads and refuses, and what it says. All results here are invented."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from evaluate.table import TEST_SIZES, superb_s
from extract.base.errors import RetortError
from pipelines.report import report_command, speed
from pipelines.report.command import read_config
from pipelines.report.published import PUBLISHED
from pipelines.report.results import read_curve, read_results
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
    svgs,
    write_results,
    write_tsv,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_results(tmp_path)
    return tmp_path


def test_results_json_holds_the_relative_score_and_flat_numbers(made: Made) -> None:
    upstreams = json.loads((made.root / "report/results.json").read_text())["upstreams"]
    for name, row in upstreams.items():
        shares = [(tests[name] - tests["fbank"]) / (tests["teacher"] - tests["fbank"]) for *_, tests in TASKS.values()]
        assert row.pop("relative_score") == pytest.approx(250 * sum(shares), abs=0.06)
        assert row == {
            "kind": name if name == "teacher" else "baseline" if name == "fbank" else "student",
            "params": PARAMS[name],
            "macs_per_audio_s": invented_speed().macs_per_audio_s[name],
            "rtf": pytest.approx(invented_speed().rtf[name], abs=1e-6),
        } | {task: tests[name] for task, (_, _, tests) in TASKS.items()}


def test_the_winner_is_named_and_so_are_the_losers(made: Made) -> None:
    sentence = (
        "demo-interleaved came first with a relative score of 860 (fbank 0, teacher 1000); demo-layerwise (826), "
        "demo-distilhubert (707) and demo-gendistiller (−49, worse than fbank) lost to it."
    )
    markdown = (made.root / "report/results.md").read_text()
    assert sentence in re.sub(r"<[^>]+>", "", made.page)
    assert sentence in markdown
    assert NOTE in markdown
    assert "seed 7" in markdown and "400 steps instead of 200,000" in markdown
    assert "| demo-interleaved | student | **860** | **20.40** | **31.20** | 91.40 | **83.00** |" in markdown


def test_the_terminal_shows_the_table_whole_even_on_a_narrow_terminal(made: Made) -> None:
    lines = made.terminal.splitlines()
    line = next(line for line in lines if line.startswith("demo-gendistiller"))
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
    assert any("demo-interleaved came first" in line for line in lines)
    assert NOTE in lines


@pytest.mark.parametrize(
    ("gone", "made"),
    [
        ("manifests/distill/teacher.json", "manifests/distill/teacher.json"),
        ("students/demo-layerwise/config.json", "students/demo-layerwise"),
        ("runs/demo-gendistiller/metrics.json", "runs/demo-gendistiller/metrics.json"),
        ("scores/fbank/ks.json", "scores/fbank/ks.json"),
    ],
)
def test_a_missing_file_says_what_makes_it(tree: Path, gone: str, made: str) -> None:
    (tree / gone).unlink()
    with pytest.raises(RetortError, match=f"is missing; `dvc repro .*{made}` makes it"):
        read_results(tree, STUDENTS, TASKS)


def test_results_that_do_not_belong_together_are_refused(tree: Path) -> None:
    change(tree / "runs/demo-layerwise/metrics.json", teacher="another")
    with pytest.raises(RetortError, match="demo-layerwise was trained from teacher store another"):
        read_results(tree, STUDENTS, TASKS)
    change(tree / "runs/demo-layerwise/metrics.json", teacher=FINGERPRINT)
    change(tree / "scores/fbank/sid.json", labels_digest="another")
    with pytest.raises(RetortError, match="labels_digest"):
        read_results(tree, STUDENTS, TASKS)


def test_a_damaged_score_is_named_with_its_field(tree: Path) -> None:
    change(tree / "scores/teacher/pr.json", chosen_lr="fast")
    with pytest.raises(RetortError, match=r"teacher/pr\.json: chosen_lr: got 'fast', expected float"):
        read_results(tree, STUDENTS, TASKS)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("report", "speed", "threads"), 0, "report.speed.threads: got 0, expected more than 0"),
        (("report", "speed", "split"), 3, "report.speed.split: got 3, expected str"),
        (("report", "speed", "runds"), 3, "report.speed 'runds': expected one of audio_seconds, corpus"),
        (("students",), "all", "`students` is 'all', expected a list of names"),
        (("report",), None, "has no section `report`"),
    ],
)
def test_params_are_parsed_strictly(tree: Path, place: tuple[str, ...], value: object, message: str) -> None:
    params = yaml.safe_load((tree / "params.yaml").read_text())
    section = params
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(RetortError, match=re.escape(message)):
        read_config(tree / "params.yaml")


def test_a_curve_is_read_as_dvclive_writes_it(tmp_path: Path) -> None:
    write_tsv(tmp_path / "loss.tsv", [(0, 1.5), (10, 0.25)])
    assert read_curve(tmp_path / "loss.tsv") == [(0, 1.5), (10, 0.25)]
    assert read_curve(tmp_path / "never-logged.tsv") == []
    (tmp_path / "loss.tsv").write_text("step\tother\n0\t1\n")
    with pytest.raises(RetortError, match="columns step and loss"):
        read_curve(tmp_path / "loss.tsv")


def report_of(tree: Path, students: list[str], tasks: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    params = yaml.safe_load((tree / "params.yaml").read_text()) | {"students": students, "tasks": {"speech": tasks}}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tree)
    monkeypatch.setattr(speed, "measure_speed", lambda *args, **kwargs: invented_speed())
    result = CliRunner().invoke(report_command, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_report_without_a_scale_still_stands(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(tree / "scores/fbank/asr.json", test=25.0)
    change(tree / "runs/demo-layerwise/metrics.json", loss={"train": 0.4, "dev": None, "dev_stored_stem": None})
    shutil.rmtree(tree / "runs/demo-layerwise/plots")
    output = report_of(tree, ["demo-layerwise"], ["asr"], monkeypatch)
    assert "No student came first: on no task is the teacher better than fbank" in output
    assert json.loads((tree / "report/results.json").read_text())["upstreams"]["teacher"]["relative_score"] is None
    assert "on no task is the teacher better than fbank" in (tree / "report/results.md").read_text()
    assert len(list(svgs((tree / "report/index.html").read_text()))) == 2


def test_a_report_without_students_still_stands(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No student was asked for" in report_of(tree, [], ["ks"], monkeypatch)


def test_intervals_stand_beside_every_score(made: Made) -> None:
    markdown = (made.root / "report/results.md").read_text()
    caveat = "about ± 3.0 on PR (320), 3.0 on ASR (320), 3.0 on KS (320) and 3.0 on SID (320): points"
    line = "| demo-interleaved | 20.40 (17.15–23.15) | 31.20 (27.95–33.95) | 12.50 | 91.40 (88.15–94.15) | 83.00 (79.75"
    for text in (markdown, made.page):
        assert caveat in text
    assert line in markdown and "20.40 (17.15–23.15)" in made.page
    assert "| upstream | PR PER % ↓ | ASR WER % ↓ | ASR CER |" in markdown


def test_scores_of_other_corpora_have_no_place_among_published_models(ten: Made) -> None:
    for text in (ten.page, (ten.root / "report/results.md").read_text()):
        assert "These scores have no place among published models" in text and "DPHuBERT" not in text


def test_official_scores_have_their_place_among_published_models(tmp_path: Path) -> None:
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


def test_part_of_the_tasks_stands_among_published_models_without_the_one_score(tmp_path: Path) -> None:
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
