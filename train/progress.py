"""What a person sees while a student trains, and the curves that DVC plots.

Curves go through DVCLive to RUN/plots/metrics/train/loss.tsv and its like; no DVC experiment is saved and nothing
leaves the machine.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from extract.base.progress import ProgressBar


class Display:
    """Progress and curves of one run. Use as a context manager.

    Arguments:
        title: the student's name.
        first, total: steps done before, and of the whole run.
        run: folder for DVCLive, emptied first; `curve` is what an interrupted run had logged.
        shown: False for a process that is not the first of its run: it shows and writes nothing.
    """

    def __init__(
        self, title: str, *, first: int, total: int, run: Path, curve: list[tuple[int, dict[str, float]]], shown: bool
    ) -> None:
        self.shown, self.done = shown, first
        if not shown:
            return
        self.bar = ProgressBar(title, total=total, unit="steps", done=first)
        self.live = _open_live(run)
        for step, values in curve:
            self.log(step, values)

    def __enter__(self) -> Self:
        if self.shown:
            self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.bar.__exit__(kind, error, trace)
            self.live.end()

    def say(self, text: str) -> None:
        """One plain line."""
        if self.shown:
            self.bar.say(text)

    def show(self, *, loss: float, depth: int, audio_s: float) -> None:
        """Report that one more step is done, and `audio_s` seconds of audio so far in this process."""
        self.done += 1
        if self.shown:
            speed = audio_s / max(self.bar.elapsed_s, 1e-9)
            self.bar.advance(1, detail=f"loss {loss:.4f}, {depth} layers, {speed:.0f} s of audio a second")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Points of the curves at `step`."""
        if not self.shown:
            return
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.live.make_summary()


def _open_live(run: Path) -> Any:
    from dvclive.live import Live  # slow to import

    return Live(dir=str(run), dvcyaml=None, save_dvc_exp=False, report=None)
