"""Progress of a training run on the terminal, and its curves.

DVCLive writes the curves to RUN/plots/metrics/train/loss.tsv and similar files. No DVC experiment is saved and nothing
is sent over the network.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from extract.base.progress import ProgressBar


class TrainingProgress:
    """Progress bar and curves of one run, a context manager.

    Arguments:
        title: name of the student.
        first, total: steps done before, and steps of the whole run.
        folder: folder for DVCLive, emptied first.
        curve: points (step, values) that an interrupted run had logged; they are written again.
        is_shown: False for a process that is not the main one: it shows and writes nothing.
    """

    def __init__(
        self,
        title: str,
        *,
        first: int,
        total: int,
        folder: Path,
        curve: list[tuple[int, dict[str, float]]],
        is_shown: bool,
    ) -> None:
        self.is_shown, self.done = is_shown, first
        if not is_shown:
            return
        self.bar = ProgressBar(title, total=total, unit="steps", done=first)
        self.live = _open_live(folder)
        for step, values in curve:
            self.log(step, values)

    def __enter__(self) -> Self:
        if self.is_shown:
            self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_shown:
            self.bar.__exit__(kind, error, trace)
            self.live.end()

    def write_line(self, text: str) -> None:
        """Print one line to stderr."""
        if self.is_shown:
            self.bar.say(text)

    def advance(self, *, loss: float, depth: int, audio_s: float) -> None:
        """Count one more step; `audio_s`: seconds of audio so far in this process."""
        self.done += 1
        if self.is_shown:
            speed = audio_s / max(self.bar.elapsed_s, 1e-9)
            self.bar.advance(1, detail=f"loss {loss:.4f}, {depth} layers, {speed:.0f} s of audio a second")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append points to the curves at `step`."""
        if not self.is_shown:
            return
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.live.make_summary()


def _open_live(folder: Path) -> Any:
    from dvclive.live import Live  # slow to import

    return Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False, report=None)
