"""Runs `python -m pipelines bench` as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_bench_command(folder: Path, *arguments: str) -> str:
    """What the command prints; its temporary files are below `folder`. Fails with its stderr where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
