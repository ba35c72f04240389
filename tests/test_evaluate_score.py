"""superb_s against published rows, and the relative score between two measured ends."""

import csv
import json
import math
import os
import statistics
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate.scorefile import GridPoint, HeadScore, Interval, LayerPoint, ScoreFile
from evaluate.table import (
    SUPERB_CONSTANTS,
    TEST_SIZES,
    gather,
    relative_half_width,
    relative_shares,
    summarise,
    superb_s,
    superb_shares,
)
from extract.base.errors import RetortError
from extract.base.files import write_json

# SUPERB's leaderboard and the models' own papers, collected in superb_published.csv of the project's shared data:
# superb_s, then percent by task (QbE: MTWV x 100).
COLUMNS = ("pr", "asr", "ks", "qbe", "sid", "asv", "sd", "ic", "sf_f1", "sf_cer", "er")
PUBLISHED = {
    "WavLM Large": (1145, (3.06, 3.44, 97.86, 8.86, 95.49, 3.77, 3.24, 99.31, 92.21, 18.36, 70.62)),
    "WavLM Base+": (1106, (3.92, 5.59, 97.37, 9.88, 89.42, 4.07, 3.5, 99, 90.58, 21.2, 68.65)),
    "WavLM Base": (1019, (4.84, 6.21, 96.79, 8.7, 84.51, 4.69, 4.55, 98.63, 89.38, 22.86, 65.94)),
    "HuBERT Base": (941, (5.41, 6.42, 96.3, 7.36, 81.42, 5.11, 5.88, 98.34, 88.53, 25.2, 64.92)),
    "HuBERT Large": (919, (3.53, 3.62, 95.29, 3.53, 90.33, 5.98, 5.75, 98.76, 89.81, 21.76, 67.62)),
    "data2vec Large": (949, (3.6, 3.36, 96.75, 6.28, 76.77, 5.73, 5.53, 98.31, 90.98, 22.16, 66.31)),
    "wav2vec2 Large": (914, (4.75, 3.75, 96.66, 4.89, 86.14, 5.65, 5.62, 95.28, 87.11, 27.31, 65.64)),
    "LightHuBERT Small": (901, (6.6, 8.34, 96.07, 7.64, 69.7, 5.42, 5.85, 98.23, 87.58, 26.9, 64.12)),
    "DPHuBERT": (866, (9.67, 10.47, 96.36, 6.93, 76.83, 5.84, 5.92, 97.92, 86.86, 28.26, 63.16)),
    "DPWavLM": (926, (8.22, 10.19, 96.27, 8.74, 82.11, 5.98, 5.53, 98.58, 87.68, 26.11, 65.24)),
    "wav2vec2 Base": (818, (5.74, 6.43, 96.23, 2.33, 75.18, 6.02, 6.08, 92.35, 88.3, 24.77, 63.43)),
    "DistilHuBERT": (717, (16.27, 13.37, 95.98, 5.11, 73.54, 8.55, 6.19, 94.99, 82.57, 35.59, 63.02)),
    "APC": (392, (41.98, 21.28, 91.01, 3.1, 60.42, 8.56, 10.53, 74.69, 70.46, 50.89, 59.33)),
    "Mockingjay": (54, (70.19, 22.82, 83.67, 0.07, 32.29, 11.66, 10.54, 34.33, 61.59, 58.89, 50.28)),
    "TERA": (150, (49.17, 18.17, 89.48, 0.13, 57.57, 15.89, 9.96, 58.42, 67.5, 54.17, 56.27)),
    "PASE+": (149, (58.87, 25.11, 82.54, 0.72, 37.99, 11.61, 8.68, 29.82, 62.14, 60.17, 57.86)),
    "STaRHuBERT": (887, (8.16, 9.35, 96.27, 6.88, 77.58, 5.39, 6.05, 97.55, 87.94, 25.31, 63.01)),
}


def row_of(model: str) -> dict[str, float]:
    return dict(zip(COLUMNS, PUBLISHED[model][1], strict=True))


def test_superb_s_of_the_17_published_rows() -> None:
    errors = [superb_s(row_of(model)) - published for model, (published, _) in PUBLISHED.items()]
    assert len(errors) == 17
    assert max(map(abs, errors)) < 1
    assert math.sqrt(statistics.mean(error**2 for error in errors)) <= 0.3


@pytest.mark.real_data
def test_the_published_rows_are_those_of_the_shared_file() -> None:
    path = Path(os.environ.get("RETORT_REAL_DATA", "../shared/data")) / "superb_published.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with path.open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows.keys() == PUBLISHED.keys()
    for model, row in rows.items():
        values = {key.lower().removesuffix("_x100"): float(value) for key, value in row.items() if key != "model"}
        assert values == {"superb_s": PUBLISHED[model][0]} | row_of(model)


def test_superb_s_runs_from_its_fbank_to_its_sota() -> None:
    assert superb_s({name: ends[0] for name, ends in SUPERB_CONSTANTS.items()}) == pytest.approx(0)
    assert superb_s({name: ends[1] for name, ends in SUPERB_CONSTANTS.items()}) == pytest.approx(1000)


def test_superb_s_refuses_part_of_the_tasks_and_unknown_ones() -> None:
    with pytest.raises(RetortError, match="missing: qbe, sid"):
        superb_s({name: 1.0 for name in SUPERB_CONSTANTS if name not in ("qbe", "sid")})
    with pytest.raises(RetortError, match=r"unknown SUPERB term 'digits'.*sf_cer"):
        superb_s({"digits": 1.0})


def exact(values: dict[str, float], half: float | None = None) -> dict[str, tuple[float, tuple[float, float] | None]]:
    """Return terms with one half width of their intervals, or without intervals."""
    return {term: (value, None if half is None else (value - half, value + half)) for term, value in values.items()}


def score_of(values: dict[str, float], *, fbank: dict[str, float], teacher: dict[str, float]) -> float:
    return sum(relative_shares(values, fbank=exact(fbank), teacher=exact(teacher)).values())


FBANK = {"pr": 80.0, "ks": 40.0}
TEACHER = {"pr": 20.0, "ks": 90.0}


def test_relative_score_is_0_at_fbank_1000_at_the_teacher_and_linear_between() -> None:
    assert score_of(FBANK, fbank=FBANK, teacher=TEACHER) == 0
    assert score_of(TEACHER, fbank=FBANK, teacher=TEACHER) == 1000
    assert score_of({"pr": 50.0, "ks": 40.0}, fbank=FBANK, teacher=TEACHER) == pytest.approx(250)


@pytest.mark.parametrize(("row", "points"), [({"pr": 14.0, "ks": 65.0}, 750), ({"pr": 200.0, "ks": 90.0}, 0)])
def test_a_task_counts_at_most_its_share(row: dict[str, float], points: float) -> None:
    assert score_of(row, fbank=FBANK, teacher=TEACHER) == pytest.approx(points)


def test_the_interval_is_that_of_many_measurements() -> None:
    """Draw all three upstreams anew, with errors of which 95% lie within the half width."""
    small, half = {"pr": 50.0, "ks": 75.0}, 3.0
    generator = np.random.default_rng(0)

    def drawn(values: dict[str, float]) -> dict[str, float]:
        return {term: value + generator.normal() * half / 1.96 for term, value in values.items()}

    scores = [score_of(drawn(small), fbank=drawn(FBANK), teacher=drawn(TEACHER)) for _ in range(20_000)]
    found = relative_half_width(exact(small, half), fbank=exact(FBANK, half), teacher=exact(TEACHER, half))
    assert found == pytest.approx(1.96 * np.std(scores), rel=0.02)
    assert relative_half_width(exact(small), fbank=exact(FBANK, half), teacher=exact(TEACHER, half)) is None


def test_slot_filling_has_the_interval_of_two_dependent_terms() -> None:
    fbank, teacher, small = (
        {"sf_f1": 50.0, "sf_cer": 60.0},
        {"sf_f1": 90.0, "sf_cer": 20.0},
        {"sf_f1": 90.0, "sf_cer": 20.0},
    )
    found = relative_half_width(exact(small, 2.0), fbank=exact(fbank, 2.0), teacher=exact(teacher, 0.0))
    assert found == pytest.approx(1000 * 2.0 / 40)  # at the teacher's place fbank's error has no effect


@pytest.mark.parametrize(("half", "left_out"), [(7.0, True), (6.9, True), (4.9, False)])
def test_a_task_whose_gap_lies_inside_the_intervals_is_left_out(half: float, left_out: bool) -> None:
    fbank, teacher = exact(FBANK, 1.0) | exact({"er": 40.0}, half), exact(TEACHER, 1.0) | exact({"er": 47.0}, half)
    found = relative_shares({"pr": 20.0, "ks": 90.0, "er": 40.0}, fbank=fbank, teacher=teacher)
    assert found.keys() == {"pr", "ks"} | (set() if left_out else {"er"})
    assert sum(found.values()) == pytest.approx(1000 if left_out else 2000 / 3)


def test_relative_score_between_the_published_ends_is_superb_s_but_for_shares_above_their_own() -> None:
    low, high = ({term: ends[side] for term, ends in SUPERB_CONSTANTS.items()} for side in (0, 1))
    for model in PUBLISHED:
        row = row_of(model)
        expected = sum(min(max(points, -100), 100) for points in superb_shares(row).values())
        assert score_of(row, fbank=low, teacher=high) == pytest.approx(expected)


def test_each_task_adds_its_share_and_slot_filling_is_one_task() -> None:
    shares = superb_shares(row_of("HuBERT Base"))
    assert len(shares) == 10 and sum(shares.values()) == superb_s(row_of("HuBERT Base"))
    assert shares["ks"] == pytest.approx(100 * (96.3 - 41.38) / (96.66 - 41.38))
    slots = (88.53 - 69.64) / (89.81 - 69.64), (25.2 - 52.94) / (21.76 - 52.94)
    assert shares["sf"] == pytest.approx(100 * sum(slots) / 2)


def test_tasks_on_which_the_teacher_is_not_better_than_fbank_are_left_out(tmp_path: Path) -> None:
    ends = {"fbank": FBANK | {"sd": 10.0}, "teacher": TEACHER | {"sd": 11.0}}
    row = {"pr": 50.0, "ks": 65.0, "sd": 5.0}
    assert score_of(row, **ends) == score_of({"pr": 50.0, "ks": 65.0}, fbank=FBANK, teacher=TEACHER)
    for name, values in (*ends.items(), ("small", row)):
        for task, value in values.items():
            write_score(tmp_path, name, task, value)
    summary = summarise(gather([tmp_path]), fbank="fbank", teacher="teacher")
    assert summary.one_score["small"] == 500
    (note,) = (one for one in summary.notes if one.startswith("left out"))
    assert note.endswith("teacher is not better than fbank by more than both intervals: sd (11.00 and 10.00)")


def test_own_tasks_have_their_share_in_their_own_direction(tmp_path: Path) -> None:
    ends = {"fbank": {"ks": 40.0, "lid": 20.0, "rate_x": 60.0}, "teacher": {"ks": 90.0, "lid": 80.0, "rate_x": 70.0}}
    for name, values in (*ends.items(), ("small", {"ks": 65.0, "lid": 35.0, "rate_x": 50.0})):
        for task, value in values.items():
            write_score(tmp_path, name, task, value, higher_is_better=task != "rate_x")
    summary = summarise(gather([tmp_path]), fbank="fbank", teacher="teacher")
    assert summary.shares["small"] == {"ks": 250, "lid": 125}
    assert any(note.endswith("rate_x (70.00 and 60.00)") for note in summary.notes)


def test_relative_score_refuses_other_tasks_and_no_scale_at_all() -> None:
    with pytest.raises(RetortError, match=r"same tasks.*ks"):
        score_of({"pr": 50.0}, fbank=FBANK, teacher=TEACHER)
    with pytest.raises(RetortError, match="on which the teacher is better than fbank"):
        score_of(FBANK, fbank=TEACHER, teacher=TEACHER)


def write_score(folder: Path, upstream: str, task: str, test: float, **changes: Any) -> Path:
    score = ScoreFile(
        task=task,
        upstream=upstream,
        metric="per" if task == "pr" else "acc",
        higher_is_better=task != "pr",
        unit="percent",
        test=test,
        also={},
        interval=interval((test - 1, test + 1)),
        heads=(HeadScore(0, test - 0.5, {"acc": test - 0.5}), HeadScore(1, test + 0.5, {"acc": test + 0.5})),
        sd={"per" if task == "pr" else "acc": 0.5**0.5},
        chance=10.0,
        dev=test,
        chosen_lr=0.1,
        grid=(GridPoint(0.1, test, 10),),
        seed=0,
        layers=(0, 1),
        layer_weights=(0.25, 0.75),
        num_test=TEST_SIZES.get(task, 100),
        fingerprint="f",
        store_digest="s",
        corpus="tiny",
        corpus_digest="c",
        labels_digest="l",
        recipe={"steps": 10},
        code="e",
        versions={},
        notes=(),
        examples=(),
        seconds=1.0,
    )
    path = folder / upstream / f"{task}.json"
    replace(score, **changes).write(path)
    return path


def interval(test: tuple[float, float], **also: tuple[float, float]) -> Interval:
    return Interval(test=test, test_set=test, also=also, of="utterances", level_percent=95, resamples=1000, seed=0)


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
    assert summary.to_dict()["shares"]["small"] == pytest.approx({"pr": 250, "ks": 250})
    assert summary.to_dict()["deviations"]["small"] == pytest.approx({"pr": 0.5**0.5, "ks": 0.5**0.5})
    assert summary.to_dict()["intervals"]["small"] == {"pr": (49.0, 51.0), "ks": (64.0, 66.0)}
    # half widths of 1 on gaps of 60 and 50: the upstream's in full, and half of each end's
    expected = 500 * math.sqrt((1 + 0.5) * (1 / 60**2 + 1 / 50**2))
    assert summary.to_dict()["half_widths"] == {"small": pytest.approx(expected)}


def test_a_table_without_ends_has_no_one_score(tmp_path: Path) -> None:
    write_table(tmp_path)
    summary = summarise(gather([tmp_path]))
    assert summary.kind == "none"
    assert summary.to_dict()["upstreams"]["small"] == {"pr": 50.0, "ks": 65.0}


def write_official(folder: Path, **changes: Any) -> None:
    row = row_of("HuBERT Base")
    for task, value in row.items():
        if not task.startswith("sf"):
            write_score(folder, "hubert", task, value, **(changes if task == "ks" else {}))
    intervals = interval((87.5, 89.5), cer=(24.0, 26.0))
    write_score(folder, "hubert", "sf", 88.53, also={"cer": 25.20}, interval=intervals)


def test_official_gives_superb_s_with_its_shares_and_notes_that_its_constants_are_inferred(tmp_path: Path) -> None:
    write_official(tmp_path)
    summary = summarise(gather([tmp_path]), official=True)
    assert summary.kind == "superb_s" and summary.one_score["hubert"] == pytest.approx(941, abs=0.6)
    made = summary.to_dict()
    assert made["shares"]["hubert"] == pytest.approx(superb_shares(row_of("HuBERT Base")))
    assert made["intervals"]["hubert"]["sf_cer"] == (24.0, 26.0)
    assert any("inferred by fitting" in note for note in summary.notes)


def test_scores_of_other_corpora_are_not_taken_for_official(tmp_path: Path) -> None:
    write_official(tmp_path, num_test=240)
    with pytest.raises(RetortError, match=r"hubert, ks: 240 test utterances, expected the 3081 of SUPERB"):
        summarise(gather([tmp_path]), official=True)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("corpus_digest", "other"), ("labels_digest", "other"), ("recipe", {"steps": 11}), ("seed", 1)],
)
def test_scores_of_different_measurements_are_refused(tmp_path: Path, field: str, value: object) -> None:
    write_table(tmp_path)
    write_score(tmp_path, "small", "pr", 50.0, **{field: value})
    with pytest.raises(RetortError, match=f"differ in {field}"):
        gather([tmp_path])


def test_a_missing_or_outdated_score_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="no score files"):
        gather([tmp_path])
    write_json(tmp_path / "a.json", {"format_version": 1})
    with pytest.raises(RetortError, match=r"a\.json: format_version: got 1, expected 3"):
        gather([tmp_path])


def test_a_score_file_gives_what_was_written(tmp_path: Path) -> None:
    path = write_score(tmp_path, "a", "pr", 12.5, also={"cer": 3}, notes=("one", "two"))
    score = ScoreFile.read(path)
    assert score.to_dict() == ScoreFile.from_dict(json.loads(path.read_text()), path=path).to_dict()
    assert (score.test, score.also, score.grid[0].at, score.chosen, score.heaviest_layer) == (
        12.5, {"cer": 3}, 0.1, 0.1, 1
    )  # fmt: skip
    layers = replace(score, chosen_lr=None, grid=(LayerPoint(0, 1.0), LayerPoint(1, 2.0)))
    layers.write(path)
    assert ScoreFile.read(path) == layers and layers.chosen == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"seed": None}, "seed: got None, expected int"),
        ({"test": "12"}, "test: got '12', expected float"),
        ({"test": math.nan}, "test: got nan, expected float"),
        ({"extra": 1}, "'extra': expected one of"),
        ({"interval": {"test": None, "test_set": None}}, "interval: `also` is missing"),
        ({"grid": [{"lr": 0.1, "dev": 1.0}]}, "grid"),
        ({"grid": [3]}, "grid: got 3"),
        ({"layers": [0]}, "layer_weights: got 2, .* 1 layers"),
        ({"format_version": 2}, "format_version: got 2, expected 3"),
    ],
)
def test_an_invalid_score_file_is_named_with_its_field(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = write_score(tmp_path, "a", "pr", 1.0)
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(RetortError, match=f"a/pr\\.json.*{problem}"):
        ScoreFile.read(path)


@pytest.mark.parametrize("name", [field.name for field in fields(ScoreFile) if field.name != "provenance"])
def test_every_field_of_a_score_file_is_needed(tmp_path: Path, name: str) -> None:
    path = write_score(tmp_path, "a", "pr", 1.0)
    content = json.loads(path.read_text())
    del content[name]
    with pytest.raises(RetortError, match=f"`{name}` is missing"):
        ScoreFile.from_dict(content, path=path)


def test_a_score_file_of_a_version_without_provenance_is_read(tmp_path: Path) -> None:
    path = write_score(tmp_path, "a", "pr", 1.0)
    content = json.loads(path.read_text())
    assert content.pop("provenance") is None
    assert ScoreFile.from_dict(content, path=path) == ScoreFile.read(path)


def test_a_task_twice_is_refused(tmp_path: Path) -> None:
    path = write_score(tmp_path, "a", "pr", 1.0)
    with pytest.raises(RetortError, match="has task pr twice"):
        gather([path, path])
