"""Run benchmarks in this process as a user does, except that the processes of variants start with torch imported."""

import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from extract.base import timing
from extract.base.timing import TimedRun
from pipelines.__main__ import main
from tests.processes import WARM


def run_bench_command(folder: Path, *arguments: str) -> str:
    """Return the output of `bench ARGUMENTS`, with temporary files below `folder`; fail with its stderr if it fails."""
    forkserver.ensure_running()  # its own files are not below `folder`
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "get_context", lambda kind: WARM)
        patch.setattr(tempfile, "tempdir", str(folder))
        done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def invented_run(
    variant: str, wall_s: float, *, round: int = 0, cpu_s: float | None = None, peak_bytes: int = 2**20, **outcome: Any
) -> TimedRun:
    """Return a run with stated figures; CPU time is the wall clock's unless given."""
    cpu_s = wall_s if cpu_s is None else cpu_s
    return TimedRun(
        variant=variant,
        round=round,
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_bytes=peak_bytes,
        peak_gpu_bytes=None,
        outcome=outcome,
    )
