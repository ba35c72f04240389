"""Progress of a training run on the terminal, and its curves.

DVCLive writes the curves to RUN/plots/metrics/train/loss.tsv and similar files. No DVC experiment is saved and nothing
is sent over the network. `--log` adds another tool (train/curves.py); it gets the speed as well.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from extract.base.errors import RetortError
from extract.base.progress import ProgressBar
from train.curves import Curves


class TrainingProgress:
    """Progress bar and curves of one run, a context manager.

    Arguments:
        title: name of the student.
        first, total: steps done before, and steps of the whole run.
        folder: folder for DVCLive, emptied first; None: show and write nothing, as in all but the main process.
        curve: points (step, values) that an interrupted run had logged; they are written again.
        curves: record of the run in another tool, which is closed at the end.
    """

    def __init__(
        self,
        title: str,
        *,
        first: int,
        total: int,
        folder: Path | None,
        curve: list[tuple[int, dict[str, float]]],
        curves: Curves | None = None,
    ) -> None:
        self.done, self.speed, self.curves = first, 0.0, curves
        self.bar: ProgressBar | None = None
        if folder is None:
            return
        from dvclive.live import Live  # slow to import

        self.bar = ProgressBar(title, total=total, unit="steps", done=first)
        self.live: Any = Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False, report=None)
        for step, values in curve:
            self._log_live(step, values)

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
        self._in_tool(lambda curves: curves.close(failed=error is not None))

    def write_line(self, text: str) -> None:
        """Print one line to stderr."""
        if self.bar:
            self.bar.say(text)

    def advance(self, *, loss: float, depth: int, audio_s: float) -> None:
        """Count one more step; `audio_s`: seconds of audio so far in this process."""
        self.done += 1
        if self.bar:
            # Of this process since its start, so that a resumed run shows its present speed.
            self.speed = audio_s / max(self.bar.elapsed_s, 1e-9)
            self.bar.advance(1, detail=f"loss {loss:.4f}, {depth} layers, {self.speed:.0f} s of audio a second")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append points to the curves at `step`."""
        if self.bar:
            self._log_live(step, values)
        # DVCLive gets no speed: files of a run are equal to the bit from run to run.
        speed = {"train/audio_s_per_s": self.speed} if "train/loss" in values else {}
        self._in_tool(lambda curves: curves.log(step, values | speed))

    def _in_tool(self, work: Callable[[Curves], None]) -> None:
        """Call the other tool. Its failure ends the record there, not the training."""
        if self.curves is None:
            return
        try:
            work(self.curves)
        except RetortError as error:
            self.write_line(f"{error}; the training goes on without this record")
            self.curves = None

    def _log_live(self, step: int, values: dict[str, float]) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.live.make_summary()
