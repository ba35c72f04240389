"""What a killed task goes on from: the heads of a sweep between two steps.

    checkpoints/evaluate/<upstream>-<task>-<key>/<sweep>.pt    below the main working tree, removed after the score

The key is a digest of what decides the score: recipe, features, corpus and labels. A changed setting starts anew; the
same command after a kill goes on, and its score is bit-identical to an uninterrupted one on a CPU. A task of several
sweeps, such as folds, keeps a file for each.
"""

import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from evaluate.features import Source
from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.errors import RetortError
from extract.base.files import in_main_tree, sha256_json

FORMAT_VERSION = 1
FOLDER = Path("checkpoints/evaluate")
EVERY_S = 30.0
_SHARE = 0.02  # of the time that writing may take: a sweep of ASR at full size is gigabytes


class Bar(Protocol):
    """What shows how far a task is; `extract.base.progress.ProgressBar` is one."""

    def advance(self, amount: float, *, detail: str = "") -> None: ...

    def skip(self, amount: float) -> None: ...


class Progress(Protocol):
    """A task under way; `TaskSession` is one."""

    def advance(self, amount: float, *, detail: str = "") -> None:
        """Told after every step."""
        ...

    def skip(self, amount: float) -> None:
        """Told of steps that an earlier sitting took."""
        ...

    def next_sweep(self) -> "Checkpoint | None":
        """Where the sweep that begins now keeps its state; None keeps nothing."""
        ...


class TaskSession:
    """A task under way in this process: it shows how far it is and keeps what the next sitting goes on from."""

    def __init__(self, bar: Bar, folder: Path, key: str) -> None:
        self.bar, self.folder, self.key = bar, folder, key
        self.earlier_s = 0.0  # that earlier sittings worked
        self._started, self._num_sweeps = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Seconds of work, those of earlier sittings included."""
        return self.earlier_s + time.monotonic() - self._started

    def advance(self, amount: float, *, detail: str = "") -> None:
        self.bar.advance(amount, detail=detail)

    def skip(self, amount: float) -> None:
        self.bar.skip(amount)

    def next_sweep(self) -> "Checkpoint":
        self._num_sweeps += 1
        return Checkpoint(self.folder / f"{self._num_sweeps}.pt", self)

    def finish(self) -> None:
        """Remove the checkpoints; called when the score is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Checkpoint:
    """The file of one sweep."""

    def __init__(self, path: Path, sitting: TaskSession) -> None:
        self.path, self.sitting = path, sitting
        self._next_s = time.monotonic() + EVERY_S

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self._next_s

    def save(self, state: dict[str, Any]) -> None:
        """Put the sweep's state in the place of the one before."""
        start = time.monotonic()
        value = {"key": self.sitting.key, "seconds": self.sitting.seconds, "state": state}
        write_checkpoint(self.path, value, format_version=FORMAT_VERSION)
        end = time.monotonic()
        self._next_s = end + max(EVERY_S, (end - start) / _SHARE)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or None. Raises RetortError for a damaged file or one of another run."""
        value = read_checkpoint(self.path, format_version=FORMAT_VERSION)
        if value is None:
            return None
        if value["key"] != self.sitting.key:
            raise RetortError(f"checkpoint {self.path} is of other settings or data; delete it to start anew")
        self.sitting.earlier_s = max(self.sitting.earlier_s, value["seconds"])
        state: dict[str, Any] = value["state"]
        return state


def run_key(task: str, recipe: dict[str, Any], source: Source) -> str:
    """The digest of all that decides a score. recipe: as JSON values."""
    corpus = source.corpus
    return sha256_json([FORMAT_VERSION, task, recipe, source.reader.digest, corpus.digest, corpus.labels_digest])


def checkpoint_folder(upstream: str, task: str, key: str) -> Path:
    """Where a task's checkpoints lie. The upstream's name is for people alone."""
    return in_main_tree(FOLDER / f"{upstream}-{task}-{key[:16]}")
