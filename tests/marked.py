"""`python -m tests.marked MARKS ROOM …` runs `python -m ROOM …` and records its progress in the file MARKS.

A line is a process, a phase and the time: `before` an upstream, corpus or store is open, at `work`, `closing` the
result, `done` with it. The crash test reads them. Dask's workers join the command's process group, so that one signal
ends all; they and the command are forks of the same server. A score's checkpoint is kept every 0.2 s of work.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import dask


def mark(phase: str) -> None:
    with MARKS.open("a") as file:  # one short write: lines of several processes do not mix
        file.write(f"{os.getpid()} {phase} {time.monotonic()}\n")


def marked(owner: Any, name: str, phase: str | None, after: str | None = None) -> None:
    """Wrap a function to record the phase that begins with each call, and the phase `after` when it returns, if any."""
    work: Callable[..., Any] = getattr(owner, name)

    @wraps(work)
    def marking(*arguments: Any, **named: Any) -> Any:
        if phase:
            mark(phase)
        result = work(*arguments, **named)
        if after:
            mark(after)
        return result

    setattr(owner, name, marking)


def mark_extract() -> None:
    from extract import run
    from extract.shards import LocalRunner
    from extract.store.writer import StoreWriter

    marked(run._CorpusWork, "__init__", "before")
    marked(run._CorpusWork, "finish", None, "done")
    marked(LocalRunner, "write_initial_weights", "work")
    marked(LocalRunner, "write", "work")
    marked(StoreWriter, "finish", "closing")
    if "--workers" in sys.argv:
        from extract.dask_runner import DaskRunner

        marked(DaskRunner, "write", "work")
        marked(DaskRunner, "write_initial_weights", "work")


def mark_train() -> None:
    from train import loop

    marked(loop, "begin", "before")
    marked(loop.TrainingProgress, "__enter__", "work")
    marked(loop, "_finish", "closing", "done")


def mark_evaluate() -> None:
    from evaluate import checkpoint, jobs
    from evaluate.scorefile import ScoreFile

    marked(jobs, "measure", "work")
    marked(ScoreFile, "write", "closing")
    marked(jobs, "score", "before", "done")
    checkpoint.EVERY_S, checkpoint._SHARE = 0.2, 1.0


def same_server() -> None:
    """Have Dask fork its workers from the server that this process is a fork of; Python would start another."""
    from multiprocessing import forkserver

    from distributed import utils

    server: Any = forkserver._forkserver
    if server._forkserver_address is not None:
        server.ensure_running = lambda: None
        utils._forkserver_preload_set = True
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})


MARKS, ROOM, ARGUMENTS = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
{"extract": mark_extract, "train": mark_train, "evaluate": mark_evaluate}[ROOM]()
if __name__ == "__main__":
    os.setpgid(0, 0)
    mark("before")
    if "--workers" in ARGUMENTS:
        same_server()
    main = importlib.import_module(f"{ROOM}.__main__").main
    main(ARGUMENTS, prog_name=f"python -m {ROOM}")
else:  # a worker of Dask's, which imports the command's main module by another name
    try:
        os.setpgid(0, int(MARKS.read_text().split()[0]))
    except OSError:  # the command was killed in the meantime
        os._exit(1)
