"""The rooms resolve to this checkout, and every command answers."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import extract

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("room", ["extract", "train", "evaluate", "pipelines"])
def test_a_room_is_this_checkouts(room: str) -> None:
    # `evaluate` is also a well-known library: it must never be the one that answers.
    assert Path(str(importlib.import_module(room).__file__)).parent == ROOT / room


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(r"^## (\d+\.\d+\.\d+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert (
        released.groups() == (extract.__version__, cited["date-released"]) and cited["version"] == extract.__version__
    )


@pytest.mark.parametrize("room", ["extract", "train", "evaluate", "pipelines"])
def test_help_lists_commands_without_loading_torch(room: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', '--help']\n"
        f"try:\n    import {room}.__main__ as m; m.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["extract", "run"], "--upstream"),
        (["extract", "fly"], "fly"),
        (["pipelines", "corpus", "musan", ".", "--out", "x.h5"], "librispeech"),
        (["extract", "info", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_1(arguments: list[str], named: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
