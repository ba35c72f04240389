"""Scoring of all tasks and upstreams, on a Dask cluster and in one process: same scores, skipped ones, errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from evaluate_stores import Hidden, class_corpus, make_store, phone_corpus

from evaluate import checkpoint
from evaluate.__main__ import main
from tests.processes import run_command

PARAMS: dict[str, Any] = {
    "upstreams": {"one": {"source": "one", "watch": "one"}, "two": {"source": "two", "watch": "two"}},
    "tasks": {"words": ["ks", "sid"], "phones": ["pr"]},
    "evaluate": {
        "ks": {"learning_rates": [1e-1, 1e-2], "steps": 20, "dev_evaluations": 2},
        "sid": {"learning_rates": [1e-2], "steps": 20, "dev_evaluations": 2},
        "pr": {"learning_rates": [3e-2, 1e-2], "steps": 20, "batch_size": 4, "dev_evaluations": 4},
    },
}


def scaled(hidden: Hidden, gain: float) -> Hidden:
    return lambda index, frames: (gain * hidden(index, frames)).astype(np.float32)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two upstreams' stores of two corpora in the layout of dvc.yaml, and params.yaml."""
    for name, make in (("words", class_corpus), ("phones", phone_corpus)):
        card, hidden = make(tmp_path / name)
        (tmp_path / "corpora").mkdir(exist_ok=True)
        shutil.copy(card, tmp_path / "corpora" / f"{name}.json")
        for upstream, gain in (("one", 1.0), ("two", -0.3)):
            made = make_store(tmp_path / upstream / name, card, scaled(hidden, gain))
            target = tmp_path / "manifests" / upstream / f"{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, target)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every score below a folder without its wall clock."""
    found = {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")}
    return {name: {key: value for key, value in made.items() if key != "seconds"} for name, made in found.items()}


def many(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["many", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["many", *arguments])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    return done.stderr


def test_two_workers_make_the_scores_that_single_commands_make(tree: Path) -> None:
    for corpus, tasks in PARAMS["tasks"].items():
        for task in tasks:
            for upstream in PARAMS["upstreams"]:
                features = ["--manifest", f"manifests/{upstream}/{corpus}.json", "--corpus", f"corpora/{corpus}.json"]
                arguments = [*features, "--config", "params.yaml", "--out", f"single/{upstream}/{task}.json"]
                assert CliRunner().invoke(main, ["run", "--task", task, *arguments]).exit_code == 0
    done = run_command("evaluate", "many", "--workers", "2", "--out", "shared", cwd=tree, check=True)
    assert len(done.stdout.splitlines()) == 6 and "one: keyword spotting, ACC" in done.stdout
    assert all("evaluate:" in line for line in done.stderr.splitlines()), done.stderr  # progress, nothing of Dask's
    assert len(scores(tree / "shared")) == 6
    assert scores(tree / "shared") == scores(tree / "single")
    assert scores(tree / "shared")["one/ks.json"] != scores(tree / "shared")["two/ks.json"]


def test_scores_that_are_there_are_kept_and_stale_ones_made_again(tree: Path) -> None:
    assert len(many().splitlines()) == 6
    before = {path: path.stat().st_mtime_ns for path in (tree / "scores").rglob("*.json")}
    assert many() == "6 of 6 scores are up to date (same features, recipe and code)\n"
    changed_params = PARAMS | {"evaluate": PARAMS["evaluate"] | {"sid": PARAMS["evaluate"]["sid"] | {"steps": 21}}}
    (tree / "params.yaml").write_text(yaml.safe_dump(changed_params))
    assert "4 of 6 scores are up to date" in many()
    changed = {path.stem for path, then in before.items() if path.stat().st_mtime_ns != then}
    assert changed == {"sid"}


def test_checkpoints_of_a_run_killed_after_its_score_was_written_go(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.TaskSession, "finish", lambda session: None)
        many("--task", "ks")
    left = list(tree.glob("checkpoints/evaluate/*/1.pt"))
    assert len(left) == 2
    assert many("--task", "ks") == "2 of 2 scores are up to date (same features, recipe and code)\n"
    assert not list(tree.glob("checkpoints/evaluate/*"))


def test_tasks_and_upstreams_can_be_named(tree: Path) -> None:
    many("--task", "ks", "--task", "pr", "--upstream", "two")
    assert set(scores(tree / "scores")) == {"two/ks.json", "two/pr.json"}


def test_a_task_whose_corpus_is_not_configured_is_named_and_not_scored(tree: Path) -> None:
    params = PARAMS | {"corpora": {"distill": {}, "phones": {}}}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    assert many("--upstream", "one").splitlines()[0] == "not scored: KS, SID (corpus words is not configured)"
    assert scores(tree / "scores").keys() == {"one/pr.json"}
    params["corpora"] = {"phone": {}}  # misspelt
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    done = CliRunner().invoke(main, ["many"])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "'phone'" in done.stderr and "phones, words" in done.stderr


def test_what_cannot_be_is_one_line_before_any_work(tree: Path) -> None:
    assert "unknown task of params.yaml 'asr': expected one of ks, pr, sid" in refused("--task", "asr")
    assert "unknown upstream of params.yaml 'three': expected one of one, two" in refused("--upstream", "three")
    assert "give one, N > 0" in refused("--workers", "1", "--scheduler", "tcp://127.0.0.1:9")
    (tree / "manifests/two/phones.json").unlink()
    assert "manifests/two/phones.json does not exist" in refused()
    assert not (tree / "scores").exists()
    (tree / "params.yaml").write_text(yaml.safe_dump(PARAMS | {"upstreams": "all"}))
    assert "`upstreams` is 'all', expected a section" in refused()
