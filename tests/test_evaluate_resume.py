"""Resumption of killed tasks: the same score, bit for bit, wherever they were killed; damaged checkpoints."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from evaluate_stores import class_corpus, make_store, phone_corpus, without_seconds

from evaluate import checkpoint
from evaluate.checkpoint import TaskSession
from evaluate.jobs import ScoringJob, measure, score
from evaluate.scorefile import ScoreFile
from evaluate.tasks import TASKS
from extract.base.errors import RetortError
from extract.base.progress import ProgressBar
from tests.processes import Command, run_command

RECIPES: dict[str, dict[str, Any]] = {
    "ks": {"learning_rates": [1e-1, 1e-2], "steps": 12, "batch_size": 5, "dev_evaluations": 4},
    "sid": {"learning_rates": [1e-2], "steps": 12, "dev_evaluations": 3},
    "pr": {"learning_rates": [3e-2, 1e-2], "steps": 12, "batch_size": 4, "dev_evaluations": 4},
    "asr": {"learning_rates": [3e-2, 1e-2], "steps": 8, "batch_size": 8, "dev_evaluations": 2, "projection": 16,
            "hidden": 16, "time_mask_frames": 2, "feature_mask_width": 2},
}  # fmt: skip


class Killed(BaseException):
    """Ends a run as a kill does: no code between it and the command handles it."""


class Bar(ProgressBar):
    """Progress bar that ends the run after so many steps."""

    def __init__(self, until: float = float("inf")) -> None:
        super().__init__("test", total=1e9, unit="steps")
        self.until = until

    def advance(self, amount: float, *, detail: str = "") -> None:
        super().advance(amount, detail=detail)
        if self.done > self.until:
            raise Killed


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Checkpoints below tmp_path, after every step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 1e9)


def job_of(folder: Path, task: str, **changes: Any) -> ScoringJob:
    card, hidden = (phone_corpus if task in ("pr", "asr") else class_corpus)(folder)
    manifest = make_store(folder, card, hidden)
    recipe = TASKS[task].parse_recipe(RECIPES[task] | changes, where="test")
    return ScoringJob(task=TASKS[task], recipe=recipe, upstream="hand", manifest=manifest, corpus=card,
               out=folder / "scores/hand" / f"{task}.json")  # fmt: skip


@pytest.mark.parametrize("task", RECIPES)
def test_a_task_killed_again_and_again_scores_as_one_that_was_not(task: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, task)
    whole = measure(job, job.open(), TaskSession())
    for until in (3, 4, 7, job.recipe.steps - 1):
        with pytest.raises(Killed):
            score(job, Bar(until))
        assert not job.out.exists()
    (kept,) = tmp_path.glob("checkpoints/evaluate/hand-*/*")
    assert kept.name == "1.pt" and kept.parent.name.startswith(f"hand-{task}-")
    last = Bar()
    made = score(job, last)
    # The run before was killed on its last step, before that step was kept.
    assert last.before == job.recipe.steps - 1 and last.done == job.recipe.steps
    assert without_seconds(made) == without_seconds(whole)
    assert without_seconds(ScoreFile.read(job.out)) == without_seconds(whole)
    assert not list(tmp_path.glob("checkpoints/evaluate/*"))


def test_a_task_killed_while_further_seeds_train_scores_as_one_that_was_not(tmp_path: Path) -> None:
    job = job_of(tmp_path, "pr", head_seeds=3)
    whole = measure(job, job.open(), TaskSession())
    assert [head.seed for head in whole.heads] == [0, 1, 2] and job.recipe.amount == 24
    for until in (5, 14, 19):
        with pytest.raises(Killed):
            score(job, Bar(until))
    assert [path.name for path in sorted(tmp_path.glob("checkpoints/evaluate/hand-*/*"))] == ["1.pt", "2.pt"]
    last = Bar()
    assert without_seconds(score(job, last)) == without_seconds(whole)
    assert last.before == 19 and last.done == 24  # the step after it was not kept


def test_seconds_of_all_runs_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, "ks")
    with pytest.raises(Killed):
        score(job, Bar(5))
    load = checkpoint.read_checkpoint
    long_ago = {"seconds": 1000.0}
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path, **k: load(path, **k) | long_ago)
    assert 1000 < score(job, Bar()).seconds < 1100


def test_a_diverged_rate_stays_diverged(tmp_path: Path) -> None:
    # A rate so high that its loss is soon not finite, and one that is not.
    job = job_of(tmp_path, "ks", learning_rates=[1e30, 1e-2], clip_norm=1e30)
    whole = measure(job, job.open(), TaskSession())
    assert any("learning rate 1e+30 diverged" in note for note in whole.notes)
    with pytest.raises(Killed):
        score(job, Bar(9))
    assert without_seconds(score(job, Bar())) == without_seconds(whole)


def test_other_settings_start_anew_and_leave_the_checkpoint_alone(tmp_path: Path) -> None:
    job = job_of(tmp_path, "ks")
    with pytest.raises(Killed):
        score(job, Bar(5))
    other = Bar()
    score(job_of(tmp_path / "again", "ks", seed=1), other)
    assert other.before == 0
    assert len(list(tmp_path.glob("checkpoints/evaluate/*"))) == 1


def test_a_damaged_checkpoint_and_a_foreign_one_are_one_line(tmp_path: Path) -> None:
    job = job_of(tmp_path, "ks")
    with pytest.raises(Killed):
        score(job, Bar(5))
    (mine,) = tmp_path.glob("checkpoints/evaluate/hand-*/*")
    whole = mine.read_bytes()
    mine.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RetortError, match=r"1\.pt cannot be read; delete it to start anew"):
        score(job, Bar())
    mine.write_bytes(whole)
    with pytest.raises(Killed):
        score(job_of(tmp_path / "again", "sid"), Bar(5))
    (foreign,) = tmp_path.glob("checkpoints/evaluate/hand-sid-*/*")
    foreign.write_bytes(whole)
    with pytest.raises(RetortError, match=r"1\.pt belongs to other settings or data; delete it to start anew"):
        score(job_of(tmp_path / "once more", "sid"), Bar())


def test_the_command_goes_on_after_kill_9(tmp_path: Path) -> None:
    job = job_of(tmp_path, "pr")
    (tmp_path / "params.yaml").write_text(
        "evaluate: {pr: {head_seeds: 1, learning_rates: [3e-2, 1e-2], steps: 400, batch_size: 4, dev_evaluations: 100}}"
    )
    arguments = ["run", "--task", "pr", "--config", "params.yaml", "--manifest", str(job.manifest), "--corpus",
                 str(job.corpus)]  # fmt: skip
    process = Command("tests.evaluate_every_step", *arguments, "--out", "killed/hand/pr.json", cwd=tmp_path)
    while not list(tmp_path.glob("checkpoints/evaluate/hand-pr-*/1.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    done = run_command(
        "tests.evaluate_every_step", *arguments, "--out", "killed/hand/pr.json", cwd=tmp_path, check=True
    )
    assert "phoneme recognition, PER" in done.stdout
    run_command("evaluate", *arguments, "--out", "whole/hand/pr.json", cwd=tmp_path, check=True)
    killed, whole = (ScoreFile.read(tmp_path / name / "hand/pr.json") for name in ("killed", "whole"))
    assert without_seconds(killed) == without_seconds(whole)
    assert not list(tmp_path.glob("checkpoints/evaluate/*"))
