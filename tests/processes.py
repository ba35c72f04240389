"""Retort's commands in processes that start with torch imported, which otherwise takes seconds.

Each is a fork of a server that has only imported libraries. It runs the module as `python -m` does.
"""

import atexit
import itertools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["tests.imported"])
_folder = Path(tempfile.mkdtemp(prefix="retort-tests-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
_numbers = itertools.count()

ROOMS = ("extract", "train", "evaluate", "pipelines")


class Command:
    """A running `python -m MODULE ARGUMENTS`, with the methods of subprocess.Popen that tests use."""

    def __init__(self, *arguments: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
        number = next(_numbers)
        self._files = [_folder / f"{number}.{name}" for name in ("out", "err")]
        self._process = WARM.Process(target=_run, args=(arguments, str(cwd), dict(environment or {}), self._files))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, kind: int) -> None:
        os.kill(self.pid, kind)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return the text of stdout and of stderr."""
        assert self.wait(timeout) is not None, "still running"
        out, err = (file.read_text() for file in self._files)
        return out, err


def run_command(
    *arguments: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, check: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m ARGUMENTS` as subprocess.run does, with captured output. `check`: assert exit status 0."""
    command = Command(*arguments, cwd=cwd, environment=environment)
    out, err = command.communicate()
    assert command.returncode is not None
    assert not check or command.returncode == 0, err
    return subprocess.CompletedProcess(arguments, command.returncode, out, err)


def _run(arguments: tuple[str, ...], cwd: str, environment: dict[str, str], files: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    module, *sys.argv[1:] = arguments
    sys.path.insert(0, cwd)  # as `python -m` does
    # The server may have imported Retort for other tests; the command's code lies in its working folder.
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOMS]:
        del sys.modules[name]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
