"""DVC on real data that git does not have: experiments, the queue, and a machine without data and teacher.

One small data set in LibriSpeech's layout and a HuBERT with random weights lie below `data/`, which git ignores. The
study is the shipped profile librispeech-100 with smaller numbers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from transformers import HubertConfig, HubertModel

from tests.conftest import TINY, save_teacher

ROOT = Path(__file__).parents[1]
STUDY = "studies/librispeech-100"
PIPELINE = f"{STUDY}/dvc.yaml"
STUDENT = f"{PIPELINE}:train@interleaved-12x384"
SHAPE = {"layers": 4, "dim": 32, "ffn": 64, "heads": 2, "stem_channels": 16, "position_kernel": 16,
         "position_groups": 4}  # fmt: skip
SETTINGS = {  # of the tiny teacher; everything else is the profile's
    "upstreams.teacher.source": "data/hubert",
    "teacher": {"layers": "2,4", "keep": "frames,pooled,stem", "initial_blocks": 1},
    "store": {"pack_frames": 256, "shard_packs": 2},
    "machine": {"extract": "--device cpu", "train": "--device cpu", "evaluate": "--workers 0"},
    "train.defaults": {"targets": [2, 4], "steps": 4, "shape": SHAPE, "growth": {"first": 2}, "stem": "stored",
                       "optimiser": {"accumulate": 1, "stem_grad_scale": 0.0}, "precision": "fp32", "log_every": 2,
                       "dev_every": 4},
    "train.distilhubert": {"steps": 4, "shape": SHAPE | {"layers": 2}, "optimiser": {"accumulate": 1}},
}  # fmt: skip
# Commands of the stages are `python …`; no experiment is carried to another folder by git's own settings.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                            "GIT_CONFIG_GLOBAL": os.devnull} | {
    f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}  # fmt: skip


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(*arguments: str, cwd: Path) -> str:
    return run(sys.executable, "-m", "dvc", *arguments, cwd=cwd)


def ran(output: str) -> list[str]:
    """Return the stages that DVC ran, without the name of the pipeline."""
    return [name.removeprefix(f"{PIPELINE}:") for name in re.findall(r"Running stage '(.*?)'", output)]


def steps_in(folder: Path, student: str = "interleaved-12x384") -> int:
    steps = json.loads((folder / STUDY / "runs" / student / "metrics.json").read_text())["steps"]
    assert isinstance(steps, int)
    return steps


def write_data(data: Path) -> None:
    """Write three parts of LibriSpeech with noise, a lexicon, and a teacher."""
    generator = np.random.default_rng(0)
    for number, part in enumerate(("train-clean-100", "dev-clean", "test-clean")):
        chapter = data / "librispeech/LibriSpeech" / part / str(number) / "1"
        chapter.mkdir(parents=True)
        names = [f"{number}-1-{index:04d}" for index in range(6)]
        for name in names:
            samples = generator.normal(size=generator.integers(16_000, 32_000)) * 0.1
            soundfile.write(chapter / f"{name}.flac", samples, 16_000)
        (chapter / f"{number}-1.trans.txt").write_text("".join(f"{name} A WORD\n" for name in names))
    (data / "librispeech/librispeech-lexicon.txt").write_text("A\tAH\nWORD\tW ER D\n")
    torch.manual_seed(0)
    save_teacher(HubertModel(HubertConfig(**TINY)), data / "hubert")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone with data, whose study has a teacher's store and one student."""
    root = tmp_path_factory.mktemp("clone") / "main"
    root.mkdir()
    rooms = ("extract", "train", "evaluate", "pipelines", "dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", ".dvc")
    tracked = subprocess.run(["git", "ls-files", "-z", *rooms], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in tracked.stdout.rstrip("\0").split("\0"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    write_data(root / "data")
    run("git", "init", "--quiet", "--initial-branch", "main", cwd=root)
    changes = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    study = ["pipelines", "study", "librispeech-100", "--corpora", "librispeech", *changes]
    refused = subprocess.run([sys.executable, "-m", *study, "--set", "upstreams.teacher.watch=data/hubert"], cwd=root,
                             capture_output=True, text=True, check=False, env=ENVIRONMENT)  # fmt: skip
    assert refused.returncode == 1 and "ignored by git" in refused.stderr
    run(sys.executable, "-m", *study, cwd=root)
    run("git", "add", "--all", cwd=root)
    run("git", "commit", "--quiet", "--message", "study", cwd=root)
    dvc("repro", STUDENT, cwd=root)
    return root


@pytest.fixture
def committed(world: Path) -> Iterator[Path]:
    """Return the world with its lock file committed, and undo what a test changes."""
    run("git", "add", "--all", cwd=world)
    if run("git", "status", "--porcelain", cwd=world):
        run("git", "commit", "--quiet", "--message", "lock", cwd=world)
    yield world
    run("git", "checkout", "--quiet", ".", cwd=world)
    dvc("checkout", "--quiet", STUDENT, cwd=world)


def files_of(world: Path) -> dict[str, int]:
    """Return size and time of the bulky files, which no experiment may touch."""
    folders = (world / "stores", world / STUDY / "corpora")
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_an_experiment_needs_no_committed_lock_and_no_data_set(world: Path) -> None:
    before = files_of(world)
    output = dvc("exp", "run", "--temp", "-S", f"{STUDY}/params.yaml:++train.interleaved-12x384.steps=6", STUDENT,
                 cwd=world)  # fmt: skip
    assert ran(output) == ["train@interleaved-12x384"]
    assert files_of(world) == before and steps_in(world) == 4


def test_results_of_the_queue_come_back(committed: Path) -> None:
    before = files_of(committed)
    dvc("exp", "run", "--queue", "--name", "longer", "-S", f"{STUDY}/params.yaml:++train.interleaved-12x384.steps=7",
        STUDENT, cwd=committed)  # fmt: skip
    dvc("queue", "start", cwd=committed)
    try:
        for _ in range(600):  # a worker that dies makes no reference
            if "/longer" in run("git", "for-each-ref", "refs/exps", cwd=committed):
                break
            time.sleep(1)
    finally:
        dvc("queue", "stop", "--kill", cwd=committed)
    assert f"{STUDY}/students/interleaved-12x384" in dvc("queue", "logs", "longer", cwd=committed)
    shown = json.loads(dvc("exp", "show", "--json", cwd=committed))
    (row,) = [one["revs"][0] for entry in shown for one in entry["experiments"] or [] if one["name"] == "longer"]
    params = row["data"]["params"][f"{STUDY}/params.yaml"]["data"]
    assert params["train"]["interleaved-12x384"]["steps"] == 7
    # DVC's exit status is not 0, because it also lists the outputs of stages that have never run.
    subprocess.run([sys.executable, "-m", "dvc", "exp", "apply", "longer"], cwd=committed, check=False, env=ENVIRONMENT,
                   capture_output=True)  # fmt: skip
    assert steps_in(committed) == 7
    assert files_of(committed) == before


def test_a_stage_that_runs_in_an_experiment_finds_data_set_and_teacher(committed: Path) -> None:
    output = dvc("exp", "run", "--temp", "-S", f"{STUDY}/params.yaml:teacher.codec=int4", f"{PIPELINE}:extract-teacher",
                 f"{PIPELINE}:corpus@librispeech", cwd=committed)  # fmt: skip
    assert sorted(ran(output)) == ["corpus@librispeech", "extract-teacher"]
    assert len(list((committed / "stores").glob("teacher-*"))) == 2


def test_an_edit_of_a_student_runs_that_student_alone(committed: Path) -> None:
    params = yaml.safe_load((committed / STUDY / "params.yaml").read_text())
    params["train"]["interleaved-12x384"]["steps"] = 5
    (committed / STUDY / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert ran(dvc("repro", "--dry", STUDENT, cwd=committed)) == ["train@interleaved-12x384"]


def test_a_node_trains_from_card_index_manifest_and_store(committed: Path, tmp_path: Path) -> None:
    run(
        sys.executable,
        "-m",
        "dvc",
        "remote",
        "add",
        "--local",
        "--default",
        "shared",
        str(tmp_path / "dvc"),
        cwd=committed,
    )
    dvc("push", PIPELINE, cwd=committed)
    node = tmp_path / "node"
    run("git", "clone", "--quiet", str(committed), str(node), cwd=tmp_path)
    shutil.copy(committed / ".dvc/config.local", node / ".dvc")
    shutil.copytree(committed / "stores", node / "stores")
    # The student that the first machine has made is fetched, the other one is trained.
    other = f"{PIPELINE}:train@distilhubert"
    assert ran(dvc("repro", "--pull", STUDENT, other, cwd=node)) == ["train@distilhubert"]
    output = dvc("exp", "run", "--temp", "-S", f"{STUDY}/params.yaml:train.distilhubert.steps=6", other, cwd=node)
    assert ran(output) == ["train@distilhubert"]
    assert not (node / "data").exists() and not list(node.rglob("distill.h5"))
    # A change of code that a stage shares: `-s` runs the named stage alone.
    with (node / "extract/store/reader.py").open("a") as file:
        file.write("# changed\n")
    assert "extract-teacher" in ran(dvc("repro", "--dry", other, cwd=node))
    assert ran(dvc("repro", "--dry", "--single-item", other, cwd=node)) == ["train@distilhubert"]
