"""Crash test in short: six kills over the three stages change no file, and a difference would be found."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.crash_test import CrashTest, Different, compare, prepare


def test_stages_killed_at_random_leave_what_an_undisturbed_run_leaves(tmp_path: Path) -> None:
    lines: list[str] = []
    test = CrashTest(tmp_path, prepare(tmp_path, "short"), kills=6, seed=0, say=lines.append)
    test.run()
    assert len(test.landed) >= 6, lines  # more if a stage had no kill at first
    assert {kill.room for kill in test.landed} == {"extract", "train", "evaluate"}, lines
    assert Counter(kill.phase for kill in test.landed)["work"] >= 3, lines
    assert lines[-1].endswith("files are those of the undisturbed run")


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in seconds alone."""
    for name, seconds in (("whole", 1.0), ("killed", 2.0)):
        for file in ("scores/teacher/ks.json", "runs/one/metrics.json"):
            (tmp_path / name / file).parent.mkdir(parents=True)
            (tmp_path / name / file).write_text(json.dumps({"test": 50.0, "seconds": seconds}))
        (tmp_path / name / "stores").mkdir()
        (tmp_path / name / "stores/hidden").write_bytes(bytes(100))
    return tmp_path / "whole", tmp_path / "killed"


def test_a_bit_a_file_and_a_figure_that_differ_are_named(runs: tuple[Path, Path]) -> None:
    whole, killed = runs
    assert compare(whole, killed) == 3
    (killed / "stores/hidden").write_bytes(bytes(99) + b"\x01")
    with pytest.raises(Different, match="stores/hidden differs from byte 99 of 100 and 100"):
        compare(whole, killed)
    shutil.copy(whole / "stores/hidden", killed / "stores")
    (killed / "scores/teacher/.ks.json.01234567.aside").write_text("half")
    with pytest.raises(Different, match=r"\.aside is in the killed run alone \(1 such\)"):
        compare(whole, killed)
    (killed / "scores/teacher/.ks.json.01234567.aside").unlink()
    (killed / "scores/teacher/ks.json").write_text(json.dumps({"test": 50.1, "seconds": 1.0}))
    with pytest.raises(Different, match=r"scores/teacher/ks\.json differs: test"):
        compare(whole, killed)
