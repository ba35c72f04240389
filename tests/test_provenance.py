"""Provenance: the revision of a checkout, the device, and both in the records and on the page."""

import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch

from extract.base.device import device_model
from extract.base.machine import describe_machine
from extract.base.provenance import Revision, read_revision
from pipelines.report.provenance import describe_code, provenance_facts
from pipelines.report.results import read_results
from tests.report_world import SCORED, STUDENTS, TASKS, TRAINED, Made, change, section


def git(folder: Path, *arguments: str) -> str:
    me = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *me, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout with code, settings and the files that `dvc repro` writes."""
    folder = tmp_path / "checkout"
    for name in (
        "code.py",
        "params.yaml",
        "dvc.lock",
        "metrics/one.json",
        "studies/a/dvc.lock",
        "studies/a/metrics/b.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


def test_a_revision_is_commit_branch_and_changed_files(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    revision = read_revision(checkout)
    assert revision == Revision(commit=commit, branch="main", changed=())
    assert str(revision) == commit[:12]
    for written in checkout.rglob("dvc.lock"):
        written.write_text("2\n")
    shutil.rmtree(checkout / "metrics")  # as DVC does before the stage runs
    (checkout / "studies/a/metrics/b.json").write_text("2\n")
    (checkout / "notes.txt").write_text("of no commit\n")
    assert read_revision(checkout) == revision
    (checkout / "params.yaml").write_text("2\n")
    (checkout / "code.py").rename(checkout / "moved.py")
    git(checkout, "add", "moved.py")
    git(checkout, "switch", "--quiet", "--detach")
    changed = read_revision(checkout)
    assert changed == Revision(commit=commit, branch=None, changed=("code.py", "moved.py", "params.yaml"))
    assert str(changed) == f"{commit[:12]}-dirty"


def test_a_release_without_git_has_no_revision(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "unpacked").mkdir()  # inside a repository that is not its own
    assert read_revision(checkout / "unpacked") is None
    assert read_revision(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert read_revision(tmp_path) is None  # no commit yet
    monkeypatch.setenv("PATH", "")
    assert read_revision(checkout) is None  # git is not installed
    assert "not a git checkout" in describe_code(None)


def test_the_device_is_a_model_and_not_a_host() -> None:
    assert device_model("cpu") == describe_machine()["processor"]
    if torch.cuda.is_available():
        assert device_model("cuda") == torch.cuda.get_device_name()


def test_the_page_names_code_devices_and_versions(made: Made) -> None:
    made_page, markdown = unescape(section(made.page, "made")), (made.root / "report/results.md").read_text()
    revision = read_revision()
    facts = [
        describe_code(revision),
        f"{TRAINED.device}, revision {TRAINED.revision}; 6.5 min in all",
        f"{SCORED.device}, revision {SCORED.revision}; 1.7 min in all, one by one",
        "Teacher's processor; 0.00 GB in int8 for 0.00 h",
        f"not recorded, {describe_machine()['processor']}",
        "torch 2.11.0, transformers 5.23.0",
    ]
    for fact in facts:
        assert fact in made_page and fact in markdown
    if revision is not None:
        assert f"git checkout {revision.commit}\n" in made_page
    assert "pip install -r requirements/run.lock && dvc repro\n" in made_page


def test_results_of_several_machines_are_named_as_a_mixture(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "copy")
    change(tmp_path / "copy/scores/fbank/ks.json", provenance={"revision": None, "device": "Another"})
    results = read_results(tmp_path / "copy", STUDENTS, TASKS)
    many = Revision(commit="c0" * 20, branch="main", changed=tuple(f"{number}.py" for number in range(7)))
    facts = provenance_facts(replace(results, speed=None), many)
    assert facts["scores"].startswith(f"{SCORED.device}, revision {SCORED.revision}; Another, revision unknown; ")
    assert "speed" not in facts
    processor = describe_machine()["processor"]
    assert results.speed is not None
    measured = replace(results.speed, provenance=replace(SCORED, device=processor))
    assert provenance_facts(replace(results, speed=measured), many)["speed"].count(processor) == 1
    assert re.search(r"revision (c0){20}, branch main, changed since: 0\.py, .*4\.py and 2 more$", facts["code"])
