"""The recording booth: jobs of speaking, each in a fresh process, their results in order.

espeak-ng carries hidden state from one utterance to the next (flutter, noise), so what it says depends on what it said
before. One job, one fresh process: then a job's samples depend on the job alone, whatever the number of workers.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

Job = TypeVar("Job")
Take = TypeVar("Take")


class ProcessPool:
    """Worker processes for the length of a `with` block. Leaving it, also by an error or Ctrl-C, ends them."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipelines.demo.corpora"])  # imported once, then forked: a job starts in 20 ms
        self._pool = context.Pool(workers, initializer=_leave_interrupts_to_the_parent, maxtasksperchild=1)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()
        self._pool.join()

    def record(self, function: Callable[[Job], Take], jobs: Sequence[Job]) -> Iterator[Take]:
        """`function(job)` in the order of the jobs; `function` must be importable by name."""
        return self._pool.imap(function, jobs, chunksize=1)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
