"""Progress that lets a person estimate the end: a live bar in a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """`with ProgressBar("extract", total=3600, unit="s of audio") as bar: bar.advance(41.0, detail="…")`."""

    def __init__(self, title: str, *, total: float, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0.0
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
            self._task = self._bar.add_task(title, total=total, detail="")

    def __enter__(self) -> "ProgressBar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float, *, detail: str = "") -> None:
        """Count `amount` more units as done; `detail` stands beside the bar."""
        self.done += amount
        if self._bar:
            self._bar.update(self._task, completed=self.done, detail=detail)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or self.done >= self.total:
            self._last_line = now
            elapsed = now - self.started
            left = elapsed / self.done * max(self.total - self.done, 0) if self.done else float("nan")
            print(
                f"{self.title}: {self.done:.0f}/{self.total:.0f} {self.unit}, {elapsed:.0f} s, about {left:.0f} s left"
                + (f", {detail}" if detail else ""),
                file=sys.stderr,
                flush=True,
            )
