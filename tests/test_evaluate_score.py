"""superb_s against published rows, and the relative score between two measured ends."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from evaluate.score import SUPERB_CONSTANTS, gather, relative_score, summarise, superb_s
from extract.errors import RetortError
from extract.files import write_json

# Published: PR, ASR, KS, IC, SID, ASV, SD, ER, SF F1, SF CER, QbE x 100 -> superb_s.
COLUMNS = ("pr", "asr", "ks", "ic", "sid", "asv", "sd", "er", "sf_f1", "sf_cer", "qbe")
PUBLISHED = {
    "HuBERT Base": ((5.41, 6.42, 96.30, 98.34, 81.42, 5.11, 5.88, 64.92, 88.53, 25.20, 7.36), 941),
    "WavLM Base+": ((3.92, 5.59, 97.37, 99.00, 89.42, 4.07, 3.50, 68.65, 90.58, 21.20, 9.88), 1106),
    "DistilHuBERT": ((16.27, 13.37, 95.98, 94.99, 73.54, 8.55, 6.19, 63.02, 82.57, 35.59, 5.11), 717),
    "DPHuBERT": ((9.67, 10.47, 96.36, 97.92, 76.83, 5.84, 5.92, 63.16, 86.86, 28.26, 6.93), 866),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_superb_s_of_published_rows(model: str) -> None:
    row, expected = PUBLISHED[model]
    assert superb_s(dict(zip(COLUMNS, row, strict=True))) == pytest.approx(expected, abs=0.6)


@pytest.mark.real_data
def test_superb_s_of_every_published_row() -> None:
    path = Path(os.environ.get("RETORT_REAL_DATA", "../shared/data")) / "superb_published.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 17
    for row in rows:
        values = {key.lower().removesuffix("_x100"): value for key, value in row.items() if key != "model"}
        expected = float(values.pop("superb_s"))
        got = superb_s({key: float(value) for key, value in values.items()})
        assert got == pytest.approx(expected, abs=1), row["model"]


def test_superb_s_runs_from_its_fbank_to_its_sota() -> None:
    assert superb_s({name: ends[0] for name, ends in SUPERB_CONSTANTS.items()}) == pytest.approx(0)
    assert superb_s({name: ends[1] for name, ends in SUPERB_CONSTANTS.items()}) == pytest.approx(1000)


def test_superb_s_refuses_part_of_the_tasks_and_unknown_ones() -> None:
    with pytest.raises(RetortError, match="missing: qbe, sid"):
        superb_s({name: 1.0 for name in SUPERB_CONSTANTS if name not in ("qbe", "sid")})
    with pytest.raises(RetortError, match=r"unknown SUPERB term 'digits'.*sf_cer"):
        superb_s({"digits": 1.0})


FBANK = {"pr": 80.0, "ks": 40.0}
TEACHER = {"pr": 20.0, "ks": 90.0}


def test_relative_score_is_0_at_fbank_1000_at_the_teacher_and_linear_between_and_beyond() -> None:
    assert relative_score(FBANK, fbank=FBANK, teacher=TEACHER) == 0
    assert relative_score(TEACHER, fbank=FBANK, teacher=TEACHER) == 1000
    assert relative_score({"pr": 50.0, "ks": 40.0}, fbank=FBANK, teacher=TEACHER) == pytest.approx(250)
    assert relative_score({"pr": 14.0, "ks": 95.0}, fbank=FBANK, teacher=TEACHER) == pytest.approx(1100)


def test_relative_score_between_the_published_ends_is_superb_s() -> None:
    # Slot filling as one task of two terms apart: with equal weights for the other nine the formulas are the same one.
    ends = {n: e for n, e in SUPERB_CONSTANTS.items() if not n.startswith("sf")}
    row = dict(zip(COLUMNS, PUBLISHED["HuBERT Base"][0], strict=True))
    nine = relative_score(
        {name: row[name] for name in ends},
        fbank={name: fbank for name, (fbank, _) in ends.items()},
        teacher={name: sota for name, (_, sota) in ends.items()},
    )
    slots = [(row[n] - f) / (s - f) for n, (f, s) in SUPERB_CONSTANTS.items() if n.startswith("sf")]
    assert (9 * nine + 1000 * sum(slots) / 2) / 10 == pytest.approx(superb_s(row))


def test_relative_score_refuses_other_tasks_and_equal_ends() -> None:
    with pytest.raises(RetortError, match=r"same tasks.*ks"):
        relative_score({"pr": 50.0}, fbank=FBANK, teacher=TEACHER)
    with pytest.raises(RetortError, match=r"task ks: fbank and the teacher both score 90\.00"):
        relative_score(FBANK, fbank={"pr": 80.0, "ks": 90.0}, teacher=TEACHER)


def write_score(folder: Path, upstream: str, task: str, test: float, **changes: Any) -> Path:
    path = folder / upstream / f"{task}.json"
    score = {
        "format_version": 1,
        "task": task,
        "upstream": upstream,
        "metric": "per" if task == "pr" else "acc",
        "higher_is_better": task != "pr",
        "test": test,
        "also": {},
        "corpus_digest": "c",
        "labels_digest": "l",
        "recipe": {"steps": 10},
        "seed": 0,
        "notes": [],
    }
    write_json(path, score | changes)
    return path


def write_table(folder: Path) -> None:
    for upstream, values in (("fbank", FBANK), ("teacher", TEACHER), ("small", {"pr": 50.0, "ks": 65.0})):
        for task, value in values.items():
            write_score(folder, upstream, task, value)


def test_a_table_has_one_row_an_upstream_with_its_relative_score(tmp_path: Path) -> None:
    write_table(tmp_path)
    summary = summarise(gather([tmp_path]), fbank="fbank", teacher="teacher")
    assert summary.to_dict()["upstreams"]["small"] == {"pr": 50.0, "ks": 65.0, "relative_score": pytest.approx(500)}
    assert summary.one_score["teacher"] == 1000
    assert any("is not superb_s" in note for note in summary.notes)


def test_a_table_without_ends_has_no_one_score(tmp_path: Path) -> None:
    write_table(tmp_path)
    summary = summarise(gather([tmp_path]))
    assert summary.kind == "none"
    assert summary.to_dict()["upstreams"]["small"] == {"pr": 50.0, "ks": 65.0}


def test_official_gives_superb_s_and_says_that_its_constants_are_inferred(tmp_path: Path) -> None:
    row, expected = PUBLISHED["HuBERT Base"]
    for task, value in zip(COLUMNS, row, strict=True):
        if not task.startswith("sf"):
            write_score(tmp_path, "hubert", task, value)
    write_score(tmp_path, "hubert", "sf", 88.53, also={"cer": 25.20})
    summary = summarise(gather([tmp_path]), official=True)
    assert summary.one_score["hubert"] == pytest.approx(expected, abs=0.6)
    assert any("inferred by fitting" in note for note in summary.notes)


def test_official_and_measured_ends_do_not_mix(tmp_path: Path) -> None:
    write_table(tmp_path)
    with pytest.raises(RetortError, match="ask for one of them"):
        summarise(gather([tmp_path]), fbank="fbank", teacher="teacher", official=True)
    with pytest.raises(RetortError, match="needs all ten tasks, missing: asr"):
        summarise(gather([tmp_path]), official=True)
    with pytest.raises(RetortError, match="both --fbank NAME and --teacher NAME"):
        summarise(gather([tmp_path]), fbank="fbank")
    with pytest.raises(RetortError, match="unknown upstream 'wavlm': expected one of fbank, small, teacher"):
        summarise(gather([tmp_path]), fbank="fbank", teacher="wavlm")


def test_an_upstream_that_lacks_a_task_has_no_one_score_and_a_note(tmp_path: Path) -> None:
    write_table(tmp_path)
    write_score(tmp_path, "half", "pr", 30.0)
    summary = summarise(gather([tmp_path]), fbank="fbank", teacher="teacher")
    assert summary.one_score["half"] is None
    assert "half lacks tasks, so it has no relative score" in summary.notes


def test_a_teacher_worse_than_fbank_is_noted(tmp_path: Path) -> None:
    write_table(tmp_path)
    write_score(tmp_path, "teacher", "ks", 30.0)
    summary = summarise(gather([tmp_path]), fbank="fbank", teacher="teacher")
    assert any("teacher is worse than fbank on ks" in note for note in summary.notes)
    assert not any("on pr" in note for note in summary.notes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("corpus_digest", "other"), ("labels_digest", "other"), ("recipe", {"steps": 11}), ("seed", 1)],
)
def test_scores_of_different_measurements_are_refused(tmp_path: Path, field: str, value: object) -> None:
    write_table(tmp_path)
    write_score(tmp_path, "small", "pr", 50.0, **{field: value})
    with pytest.raises(RetortError, match=f"differ in {field}"):
        gather([tmp_path])


def test_what_is_no_score_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="no score files"):
        gather([tmp_path])
    write_json(tmp_path / "a.json", {"format_version": 2})
    with pytest.raises(RetortError, match=r"a\.json is no score of format 1"):
        gather([tmp_path])
    write_json(tmp_path / "a.json", {"format_version": 1, "task": "pr"})
    with pytest.raises(RetortError, match="has no field 'test'"):
        gather([tmp_path])


def test_a_task_twice_is_refused(tmp_path: Path) -> None:
    path = write_score(tmp_path, "a", "pr", 1.0)
    with pytest.raises(RetortError, match="has task pr twice"):
        gather([path, path])
