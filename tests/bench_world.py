"""Runs `python -m pipelines bench` as a user does, but for contenders whose processes begin with torch imported."""

import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
from click.testing import CliRunner

from extract.base import timing
from pipelines.__main__ import main
from tests.processes import WARM


def run_bench_command(folder: Path, *arguments: str) -> str:
    """What the command prints; its temporary files are below `folder`. Fails with its stderr where it fails."""
    forkserver.ensure_running()  # its own files are not below `folder`
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "get_context", lambda kind: WARM)
        patch.setattr(tempfile, "tempdir", str(folder))
        done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout
