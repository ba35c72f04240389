"""`bench gpu`: its steps on a CPU without the libraries that a bare machine lacks, its limits and its failures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extract.base.errors import RetortError
from pipelines.bench.gpu import runner
from pipelines.bench.gpu.records import Asked, Proof, Row, Steps
from pipelines.bench.gpu.runner import STEPS, Step, ask, run_steps

ROOT = Path(__file__).parents[1]
LACKING = "espeakng_loader dask distributed dvc dvclive rapidfuzz obstore grandalf"
BLOCK = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING.split()!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
"""


def test_every_step_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """One command, as a user runs it, where only the libraries of docs/profiling.md can be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines", "bench", "gpu", "--device", "cpu", "--shape", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    logs = {path.name: path.read_text()[-1000:] for path in out.glob("*.log")}
    assert done.returncode == 0, (done.stderr[-2000:], logs)
    results = json.loads((out / "results.json").read_text())
    assert {name: one["state"] for name, one in results.items()} == dict.fromkeys(STEPS, "done")
    proved = {one["name"]: one["value"] for result in results.values() for one in result["proofs"]}
    assert (
        len([name for name in proved if "numpy" in name]) == 8
        and len([name for name in proved if "alone" in name]) == 7
    )
    assert proved["distilhubert: the first loss after a resumption, relative difference"] == 0  # bits, on a CPU
    rows = [dict(row["cells"]) for row in results["heads"]["rows"]]
    assert {row["task"] for row in rows} == {"pr", "asr", "sf", "asv", "sd"}
    assert not (out / "work").exists() and (out / "results.md").read_text().strip() in done.stdout


def passing(asked: Asked) -> Steps:
    """Yield a proof that holds, one that does not, and a row."""
    yield Proof("one is small", 1, 2)
    yield Proof("three is small", 3, 2)
    yield Row("Numbers", {"number": "one"})


def waiting(asked: Asked) -> Steps:
    """Yield a row, then wait for longer than the limit, in a child too."""
    child = subprocess.Popen(["sleep", "60"])
    yield Row("Numbers", {"number": str(child.pid)})
    time.sleep(60)


def raising(asked: Asked) -> Steps:
    """Fail after a row."""
    yield Row("Numbers", {"number": "two"})
    raise ZeroDivisionError


def test_a_failed_proof_and_a_failed_step_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"passing": Step(passing, 50), "waiting": Step(waiting, 50), "raising": Step(raising, 50)}
    # Processes are forks of a server that has not seen these steps: call the one that runs a step in a test's process.
    monkeypatch.setattr(runner, "_CONTEXT", runner.multiprocessing.get_context("fork"))
    monkeypatch.setattr(runner, "STEPS", steps)
    asked = ask(tmp_path / "out", device="cpu", shape="tiny", minutes=1)
    with pytest.raises(RetortError) as caught:
        run_steps(asked, minutes=8 / 60, only=("passing", "raising", "waiting"))
    message = str(caught.value)
    assert "'three is small'" in message and "raising" in message and "one is small" not in message
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["waiting"]["state"].startswith("stopped") and results["raising"]["state"].startswith("failed")
    assert len(results["passing"]["proofs"]) == 2 and len(results["raising"]["rows"]) == 1
    (row,) = results["waiting"]["rows"]  # kept from before the limit
    status = Path(f"/proc/{dict(row['cells'])['number']}/status")  # the child was stopped with its step
    assert not status.is_file() or "State:\tZ" in status.read_text()  # a zombie waits for its parent to read its status
    assert "ZeroDivisionError" in (tmp_path / "out/raising.log").read_text()
    assert "| one |" in (tmp_path / "out/results.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "huge"}, "unknown shape 'huge'"),
        ({"minutes": 0.0}, "--minutes 0.0: expected more than 0"),
        ({"device": "tpu"}, "--device 'tpu'"),
    ],
)
def test_an_invalid_request_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    asked: dict[str, object] = {"device": "cpu", "shape": "tiny", "minutes": 1.0} | change
    with pytest.raises(RetortError, match=message):
        ask(tmp_path, **asked)  # type: ignore[arg-type]
