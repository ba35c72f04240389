"""Log lines: a time and a run id outside a terminal, a live bar inside; the position of a DVC stage."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from extract.base.progress import ProgressBar
from extract.base.stage import log_stage

ROOT = Path(__file__).parent.parent
CODE = "from extract.base.progress import ProgressBar, log; "
BAR = (
    CODE + "bar = ProgressBar('work', total=2, unit='files').__enter__(); bar.skip(1); bar.say('odd'); bar.advance(1); "
    "print('result'); bar.__exit__(None, None, None)"
)
SET = ("RETORT_RUN", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


def environment(**changes: str) -> dict[str, str]:
    """Return the environment with the root on the path of modules, without a run id unless `changes` sets one."""
    kept = {name: value for name, value in os.environ.items() if name not in SET}
    return kept | {"PYTHONPATH": str(ROOT)} | changes


def lines(code: str, **changes: str) -> list[str]:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_a_line_has_a_time_and_a_run_id() -> None:
    before = datetime.now().astimezone().replace(microsecond=0)
    (line,) = lines(CODE + "log('text: of a line')")
    stamp, run, text = line.split(" ", 2)
    at = datetime.fromisoformat(stamp)
    assert at.utcoffset() == before.utcoffset() and before <= at <= datetime.now().astimezone()
    assert re.fullmatch("[0-9a-f]{6}", run) and text == "text: of a line"


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        ({"SLURM_JOB_ID": "81"}, "81"),
        ({"SLURM_JOB_ID": "83", "SLURM_ARRAY_JOB_ID": "81", "SLURM_ARRAY_TASK_ID": "2"}, "81_2"),
        ({"SLURM_JOB_ID": "81", "RETORT_RUN": "night"}, "night"),
    ],
)
def test_a_run_id_is_taken_from_the_environment(changes: Mapping[str, str], run: str) -> None:
    assert lines(CODE + "log('text')", **changes)[0].split()[1] == run


def test_processes_that_a_command_starts_share_its_run_id() -> None:
    child = CODE.replace("'", '"') + 'log("child")'
    code = f"import subprocess, sys; {CODE}log('parent'); subprocess.run([sys.executable, '-c', '{child}'])"
    parent, of_child = (line.split() for line in lines(code))
    assert parent[1] == of_child[1] and of_child[2] == "child"
    assert lines(CODE + "log('other')")[0].split()[1] != parent[1]


def test_a_terminal_has_a_bar_without_stamps_and_results_stay_on_stdout() -> None:
    piped = subprocess.run([sys.executable, "-c", BAR], env=environment(), capture_output=True, text=True, check=True)
    said, progress = piped.stderr.splitlines()
    assert said.endswith(" odd") and " work: 2/2 files, 0 s, about 0 s left" in progress
    main, terminal = pty.openpty()
    shown = subprocess.run(
        [sys.executable, "-c", BAR], env=environment(), stdout=subprocess.PIPE, stderr=terminal, text=True, check=True
    )
    os.close(terminal)
    drawn = os.read(main, 1 << 16).decode()
    os.close(main)
    assert shown.stdout == piped.stdout == "result\n"
    assert "odd" in drawn and "100%" in drawn and "result" not in drawn and not re.search(r"\d{4}-\d\d-\d\dT", drawn)


def test_time_apart_is_not_in_the_estimate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr("extract.base.progress.time.monotonic", lambda: clock[0])
    bar = ProgressBar("work", total=4, unit="files")
    with bar.apart():
        clock[0] = 30.0
    clock[0] = 40.0
    bar.advance(1)
    assert capsys.readouterr().err.endswith("work: 1/4 files, 40 s, about 30 s left\n")


def test_a_stage_says_its_position_in_the_order_of_dvc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "python -m extract --version"
    main = {
        "last": {"cmd": command, "deps": ["made.txt"]},
        "each": {"foreach": ["a", "b"], "do": {"cmd": command}},
        "first": {"cmd": f"{command} > made.txt", "outs": ["made.txt"]},
    }
    study = {"own": {"cmd": command, "wdir": "../..", "deps": ["made.txt"]}}
    for file, stages in (("dvc.yaml", main), ("studies/one/dvc.yaml", study)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "studies/one/dvc.yaml"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, own = (line.split(" ", 2)[2] for line in done.stderr.splitlines() if " stage " in line)
    place = re.fullmatch(r"stage (\d) of 4: first", first)
    assert place and own == "stage 2 of 2: own"
    (of_main,) = (file for file in (tmp_path / ".dvc/tmp/retort").iterdir() if "last" in file.read_text())
    names = yaml.safe_load(of_main.read_text())
    assert sorted(names) == ["each@a", "each@b", "first", "last"] and names.index("first") == int(place[1]) - 1
    assert names.index("first") < names.index("last")

    # Later stages read the kept order. A damaged one, and a stage that is not in it, cost the line and nothing else.
    monkeypatch.setenv("RETORT_RUN", "run")
    for stage, kept, said in (("last", '["last"]', "stage 1 of 1: last"), ("last", "{", ""), ("no", "[]", "")):
        monkeypatch.setenv("DVC_STAGE", stage)
        of_main.write_text(kept)
        log_stage()
        assert capsys.readouterr().err.partition(" run ")[2].strip() == said
