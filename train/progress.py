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
        folder: folder for DVCLive, emptied first; None: show and write nothing, as in all but the main process.
        curve: points (step, values) that an interrupted run had logged; they are written again.
    """

    def __init__(
        self, title: str, *, first: int, total: int, folder: Path | None, curve: list[tuple[int, dict[str, float]]]
    ) -> None:
        self.done = first
        self.bar: ProgressBar | None = None
        if folder is None:
            return
        from dvclive.live import Live  # slow to import

        self.bar = ProgressBar(title, total=total, unit="steps", done=first)
        self.live: Any = Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False, report=None)
        for step, values in curve:
            self.log(step, values)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.__enter__()
        return self

    # Errors pass through: the bar stops and the curves are closed for a failed run too.
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.__exit__(kind, error, trace)
            self.live.end()

    def write_line(self, text: str) -> None:
        """Print one line to stderr."""
        if self.bar:
            self.bar.say(text)

    def advance(self, *, loss: float, depth: int, audio_s: float) -> None:
        """Count one more step; `audio_s`: seconds of audio so far in this process."""
        self.done += 1
        if self.bar:
            # Of this process since its start, so that a resumed run shows its present speed.
            speed = audio_s / max(self.bar.elapsed_s, 1e-9)
            self.bar.advance(1, detail=f"loss {loss:.4f}, {depth} layers, {speed:.0f} s of audio a second")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append points to the curves at `step`."""
        if self.bar:
            self.live.step = step
            for name, value in values.items():
                self.live.log_metric(name, value)
            self.live.make_summary()
