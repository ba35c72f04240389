"""Checkpoints: all that a run is, in one file, written aside and renamed.

    checkpoints/<student>-<key>-<packs a step>/checkpoint.pt     below the main working tree, removed after success

The key is a digest of what decides the result: config, seed, store and corpus. A changed setting starts anew; the same
command after a kill goes on, and its result is bit-identical to an uninterrupted one on a CPU. On another number of
processes a run goes on too, as long as processes x `accumulate` are as many packs: it is the same run but for the
order in which gradients are added.

No random state is kept: forcing draws by step and dropout by pack (train/loop.py).
"""

import errno
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.files import in_main_tree, sha256_json
from train.config import StudentConfig
from train.initial_weights import STANDARD, StemShape
from train.optimiser import OptimiserState

FORMAT_VERSION = 3
FOLDER = Path("checkpoints")


@dataclass
class Progress:
    """What a run has done so far. Plain values: they go into the checkpoint as they are."""

    step: int = 0  # optimiser steps done
    packs: int = 0  # the sampler's position: packs of all processes
    seconds: float = 0.0
    waited_s: float = 0.0  # of these for the loader
    audio_s: float = 0.0
    recent: list[float] = field(default_factory=list)  # losses since the last logged point
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # what DVCLive is given


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps."""

    progress: Progress
    depth: int
    model: dict[str, Tensor]  # student and heads
    average: dict[str, Tensor] | None  # the same, averaged over steps; None without `optimiser.ema`
    optimiser: OptimiserState
    initial_weights: dict[str, Any] | None = (
        None  # the parts that began as the teacher's; None: written before it was recorded
    )


def run_key(config: StudentConfig, *, store_digest: str, corpus_digest: str, stem: StemShape = STANDARD) -> str:
    """The digest of all that decides a run's result but how many packs a step has."""
    value = asdict(config)
    del value["optimiser"]["accumulate"]
    # Only another stem is named: a run with the standard one keeps the key that it has always had.
    other = [] if stem == STANDARD else [asdict(stem)]
    return sha256_json([FORMAT_VERSION, value, store_digest, corpus_digest, *other])


def checkpoint_path(student: str, key: str, packs_per_step: int) -> Path:
    """Where a run's checkpoint lies."""
    return in_main_tree(FOLDER / f"{student}-{key[:16]}-{packs_per_step}") / "checkpoint.pt"


def others(path: Path) -> list[Path]:
    """Checkpoints of runs that differ from that at `path` in packs a step alone."""
    prefix = path.parent.name.rpartition("-")[0]
    return sorted(set(path.parent.parent.glob(f"{prefix}-*/{path.name}")) - {path})


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the one before stays until this one is whole."""
    value = {**vars(checkpoint), "progress": asdict(checkpoint.progress)}
    write_checkpoint(path, value, format_version=FORMAT_VERSION)


def load(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, on the CPU, or None. Raises RetortError for an unreadable one."""
    value = read_checkpoint(path, format_version=FORMAT_VERSION)
    return None if value is None else Checkpoint(**value | {"progress": Progress(**value["progress"])})


def remove(path: Path) -> None:
    """Remove a finished run's checkpoint and its folder."""
    shutil.rmtree(path.parent, ignore_errors=True)


def full_disk(path: Path) -> OSError:
    """What libraries that hide a full disk should have raised."""
    return OSError(errno.ENOSPC, "no space left on device", str(path))
