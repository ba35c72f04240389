"""Progress and log lines on stderr: a live bar in a terminal, lines with a time and a run id elsewhere.

    2026-11-29T08:10:11+00:00 3fa9c1 extract teacher on librispeech: 410/2340 s of audio, 12 s, about 56 s left

Lines of several runs in one file differ in the run id. It is RETORT_RUN if that is set, the id of a Slurm job, or
six hex digits; a command shares it with the processes that it starts. All lines of progress are written here.
"""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0
_RUN = "RETORT_RUN"


def run_id() -> str:
    """Return the id of this run, and set it in the environment for the processes that this one starts."""
    set_in = os.environ
    if not set_in.get(_RUN):
        job, task = set_in.get("SLURM_ARRAY_JOB_ID"), set_in.get("SLURM_ARRAY_TASK_ID")
        slurm = f"{job}_{task}" if job and task else set_in.get("SLURM_JOB_ID")  # as `squeue` prints them
        set_in[_RUN] = slurm or secrets.token_hex(3)
    return set_in[_RUN]


def log(text: str) -> None:
    """Write one line to stderr; outside a terminal it starts with the local time and the run id."""
    if not sys.stderr.isatty():
        text = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {run_id()} {text}"
    print(text, file=sys.stderr, flush=True)


class ProgressBar:
    """`with ProgressBar("extract", total=3600, unit="s of audio") as bar: bar.advance(41.0, detail="…")`.

    done: units that an interrupted run finished before. They count as done, but not for the estimate of the time left.
    """

    def __init__(self, title: str, *, total: float, unit: str, done: float = 0.0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.before = self.done = done
        self.started = self._last_line = time.monotonic()
        self._apart_s = 0.0
        self._bar: Progress | None = _live_bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(title, total=total, completed=int(done), detail="", left="")

    @property
    def elapsed_s(self) -> float:
        """Seconds since this bar was made."""
        return time.monotonic() - self.started

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Write one line as `log` does, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            log(text)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave the time of a block, in which no unit is done, out of the estimate of the time left."""
        start = time.monotonic()
        yield
        self._apart_s += time.monotonic() - start

    def skip(self, amount: float) -> None:
        """Count `amount` more units as done before this run: they do not enter the estimate of the time left."""
        self.before += amount
        self.done += amount
        if self._bar:
            self._bar.update(self._task, completed=self.done)

    def advance(self, amount: float, *, detail: str = "", left_s: float | None = None) -> None:
        """Count `amount` more units as done, and show `detail` beside the bar.

        left_s: seconds left, where units differ too much in their time for the mean of those done to hold.
        """
        self.done += amount
        now = time.monotonic()
        at_end = self.done >= self.total * (1 - 1e-9)  # sums of floats in another order may end just below it
        if left_s is None:
            spent_s = self.elapsed_s - self._apart_s
            left_s = spent_s / max(self.done - self.before, 1e-9) * max(self.total - self.done, 0)
        if self._bar:
            self._bar.update(self._task, completed=self.done, detail=detail, left=f"{left_s:.0f} s left")
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or at_end:
            self._last_line = now
            log(
                f"{self.title}: {self.done:.0f}/{self.total:.0f} {self.unit}, {self.elapsed_s:.0f} s, "
                f"about {left_s:.0f} s left" + (f", {detail}" if detail else "")
            )


def _live_bar() -> "Progress":
    from rich.console import Console  # late: most commands show no bar
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # results that go to a file or a pipe are not the bar's to print
    )
