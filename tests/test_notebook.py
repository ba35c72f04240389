"""docs/tour.ipynb, run on a small result of the pipeline: every stage by its command in dvc.yaml, but on noise."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from dvc.repo import Repo

from extract.corpus_writer import write_corpus
from tests.conftest import noise_utterances

ROOT = Path(__file__).parent.parent
CORPORA = ("distill", "speech-commands", "voxceleb1")
STUDENT = "distilhubert"


def write_params(folder: Path, teacher: Path) -> None:
    """Write the pipeline's settings with one small student, two tasks and a few steps."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["students"] = [STUDENT]
    params["upstreams"] = {name: params["upstreams"][name] for name in ("fbank", STUDENT)}
    params["upstreams"]["teacher"] = {"source": str(teacher), "watch": str(teacher)}
    params["corpora"] = {name: params["corpora"][name] for name in CORPORA}
    params["features"]["speech-commands"] = "frames,pooled"  # of the comparison, too
    params["teacher"]["layers"] = "2,4"
    params["machine"]["evaluate"] = "--workers 1"
    shape = {"layers": 2, "dim": 16, "ffn": 32, "heads": 2, "stem_channels": 16, "position_groups": 4}
    params["train"][STUDENT] |= {"targets": [2, 4], "steps": 3, "shape": shape}
    for task in ("ks", "sid"):
        params["evaluate"][task] |= {"steps": 4, "dev_evaluations": 2}
    params["compare"]["corpus"] = "speech-commands"
    params["report"]["speed"] |= {"corpus": "corpora/speech-commands.json", "audio_seconds": 1, "rounds": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copy(ROOT / "dvc.yaml", folder)


def commands(folder: Path) -> Iterator[list[str]]:
    """Yield the commands of the stages that a notebook's files come from, in the order of their needs."""
    Repo.init(str(folder), no_scm=True).close()
    with Repo(str(folder)) as repo:
        found = {stage.name: stage.cmd for stage in repo.index.stages}
    for stage in ("extract-teacher", "train", "extract", "evaluate", "speed", "compare", "report"):
        for name, command in found.items():
            if re.fullmatch(rf"{stage}(@.*)?", name):
                yield shlex.split(command)


@pytest.fixture
def result(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, teacher)
    for number, name in enumerate(CORPORA):
        utterances = noise_utterances(24, seed=number, shortest=4_000, longest=12_000)
        write_corpus(tmp_path / f"corpora/{name}.h5", name=name, reader="folder", utterances=utterances)
    for _, _, room, *arguments in commands(tmp_path):
        main = importlib.import_module(f"{room}.__main__").main
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return tmp_path


def test_the_notebook_runs_on_a_result(result: Path) -> None:
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / ".ci/notebook.py"), str(ROOT / "docs/tour.ipynb")]
    docs = result / "docs"  # Jupyter starts a notebook in its own folder
    docs.mkdir()
    done = subprocess.run(command, cwd=docs, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"The best student is {STUDENT}." in done.stdout
    assert "2 words, 3 test utterances, chance 50.0%" in done.stdout
    assert "3 layers of (1, " in done.stdout and ", 16)" in done.stdout
