"""Progress with an estimate of the time left: a live bar in a terminal, a line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """`with ProgressBar("extract", total=3600, unit="s of audio") as bar: bar.advance(41.0, detail="…")`.

    done: units that an interrupted run finished before. They count as done, but not for the estimate of the time left.
    """

    def __init__(self, title: str, *, total: float, unit: str, done: float = 0.0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.before = self.done = done
        self.started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=int(done), detail="")

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
        """Print one plain line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def skip(self, amount: float) -> None:
        """Count `amount` more units as done before this run: they do not enter the estimate of the time left."""
        self.before += amount
        self.done += amount

    def advance(self, amount: float, *, detail: str = "") -> None:
        """Count `amount` more units as done, and show `detail` beside the bar."""
        self.done += amount
        if self._bar:
            self._bar.update(self._task, completed=self.done, detail=detail)
            return
        now = time.monotonic()
        at_end = self.done >= self.total * (1 - 1e-9)  # sums of floats in another order may end just below it
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or at_end:
            self._last_line = now
            left = self.elapsed_s / max(self.done - self.before, 1e-9) * max(self.total - self.done, 0)
            self.say(
                f"{self.title}: {self.done:.0f}/{self.total:.0f} {self.unit}, {self.elapsed_s:.0f} s, "
                f"about {left:.0f} s left" + (f", {detail}" if detail else "")
            )
