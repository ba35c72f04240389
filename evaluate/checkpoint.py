"""Progress and checkpoints of a task under way.

    checkpoints/evaluate/<upstream>-<task>-<key>/<sweep>.pt    below the main working tree, removed after the score

The key is a digest of everything that decides the score: recipe, features, corpus and labels. A changed setting starts
from step 0; the same command after a kill resumes, and its score is bit-identical to that of an uninterrupted run on a
CPU. A task of several sweeps, such as cross-validation folds, has one file for each.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.errors import RetortError
from extract.base.progress import ProgressBar

FORMAT_VERSION = 2
EVERY_S = 30.0
_SHARE = 0.02  # of the run time that writing may take: a sweep of ASR at full size is gigabytes


class TaskSession:
    """Progress and checkpoints of a task in this process; no display without `bar`, no checkpoints without `folder`."""

    def __init__(self, bar: ProgressBar | None = None, *, folder: Path | None = None, key: str = "") -> None:
        self.bar, self.folder, self.key = bar, folder, key
        self.earlier_s = 0.0  # work of earlier, interrupted runs
        self._started, self._num_sweeps = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Return seconds of work, including those of interrupted runs."""
        return self.earlier_s + time.monotonic() - self._started

    def advance(self, amount: float, *, detail: str = "") -> None:
        """Count progress; a whole task adds up to its recipe's `amount`."""
        if self.bar is not None:
            self.bar.advance(amount, detail=detail)

    def skip(self, amount: float) -> None:
        """Count progress made by an earlier, interrupted run."""
        if self.bar is not None:
            self.bar.skip(amount)

    def next_sweep(self) -> "Checkpoint | None":
        """Return the checkpoint of the next sweep, or None if nothing is kept."""
        self._num_sweeps += 1
        return None if self.folder is None else Checkpoint(self.folder / f"{self._num_sweeps}.pt", self)

    def finish(self) -> None:
        """Remove the checkpoints; called after the score is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Checkpoint:
    """Checkpoint file of one sweep."""

    def __init__(self, path: Path, session: TaskSession) -> None:
        self.path, self.session = path, session
        self._next_s = time.monotonic() + EVERY_S

    def due(self) -> bool:
        """Return True when it is time to save."""
        return time.monotonic() >= self._next_s

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state."""
        start = time.monotonic()
        value = {"key": self.session.key, "seconds": self.session.seconds, "state": state}
        write_checkpoint(self.path, value, format_version=FORMAT_VERSION)
        end = time.monotonic()
        self._next_s = end + max(EVERY_S, (end - start) / _SHARE)

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, or None. Raises RetortError for a damaged file or one of another run."""
        value = read_checkpoint(self.path, format_version=FORMAT_VERSION)
        if value is None:
            return None
        if value["key"] != self.session.key:
            raise RetortError(f"checkpoint {self.path} belongs to other settings or data; delete it to start anew")
        self.session.earlier_s = max(self.session.earlier_s, value["seconds"])
        state: dict[str, Any] = value["state"]
        return state
