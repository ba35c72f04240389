"""Checkpoints of training runs: the whole state of a run in one file, written atomically.

    checkpoints/STUDENT-KEY-PACKS/checkpoint.pt     below the main working tree, removed after success

KEY is a digest of everything that decides the result: config, seed, store, corpus, stem and initial weights. A changed
setting starts a new run. The same command after a kill resumes, and on a CPU its result is bit-identical to that of an
uninterrupted run. A run also resumes on another number of processes if processes x `accumulate` (PACKS, the packs of a
step) is the same: only the order in which gradients are added changes.

No random state is stored: teacher forcing draws by step, dropout by pack (train/loop.py).
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.files import in_main_tree, sha256_json
from train.config import StudentConfig
from train.optimiser import OptimiserState
from train.stem import StemShape

FORMAT_VERSION = 4
FOLDER = Path("checkpoints")


@dataclass
class RunState:
    """Counters and curves of a run so far. Plain values: they are stored in the checkpoint as they are."""

    step: int = 0  # optimiser steps done
    packs: int = 0  # position of the sampler: packs of all processes
    seconds: float = 0.0
    waited_s: float = 0.0  # part of `seconds` spent waiting for batches
    audio_s: float = 0.0
    skipped: int = 0  # steps whose gradients overflowed in fp16 and changed nothing
    recent: list[float] = field(default_factory=list)  # losses since the last logged point
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # points given to DVCLive
    dev_curve: list[dict[str, Any]] = field(default_factory=list)  # DevPoints of train/metrics.py, as mappings


@dataclass(frozen=True)
class Checkpoint:
    """State of a run between two steps."""

    state: RunState
    depth: int
    model: dict[str, Tensor]  # student and heads
    average: dict[str, Tensor] | None  # the same, averaged over steps; None without `optimiser.ema`
    optimiser: OptimiserState
    copied: list[str]  # parts copied from the teacher
    random: dict[str, str]  # parts with random initial weights -> reason
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the loss scaler; empty without fp16


def run_key(
    config: StudentConfig,
    *,
    store_digest: str,
    corpus_digest: str,
    stem: StemShape,
    initial_weights: str | None,
    other_digests: Mapping[str, str],
) -> str:
    """Return the digest of everything that decides a run's result, except how many packs a step has.

    It is also without the parts that packs are cut into, so that a run which was out of memory resumes in smaller ones.

    `initial_weights` is the sha256 of their file; None if the weights start random. `other_digests`: of the codebook,
    and of the stores of dev and of the stem where they are not that of the targets.
    """
    value = asdict(config)
    del value["optimiser"]["accumulate"], value["optimiser"]["micro_frames"]
    return sha256_json(
        [
            FORMAT_VERSION,
            value,
            store_digest,
            corpus_digest,
            asdict(stem),
            initial_weights,
            *sorted(other_digests.items()),
        ]
    )


def checkpoint_path(student: str, key: str, packs_per_step: int) -> Path:
    """Return the path of a run's checkpoint."""
    return in_main_tree(FOLDER / f"{student}-{key[:16]}-{packs_per_step}") / "checkpoint.pt"


def with_other_packs(path: Path) -> list[Path]:
    """Return checkpoints of the same run with another number of packs per step than the one at `path`."""
    prefix = path.parent.name.rpartition("-")[0]
    return sorted(set(path.parent.parent.glob(f"{prefix}-*/{path.name}")) - {path})


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically: the previous one stays until this one is complete."""
    write_checkpoint(path, vars(checkpoint) | {"state": asdict(checkpoint.state)}, format_version=FORMAT_VERSION)


def load(path: Path) -> Checkpoint | None:
    """Return the checkpoint at `path`, on the CPU, or None. Raises RetortError for an unreadable file."""
    value = read_checkpoint(path, format_version=FORMAT_VERSION)
    return None if value is None else Checkpoint(**value | {"state": RunState(**value["state"])})


def remove(path: Path) -> None:
    """Remove the checkpoint of a finished run and its folder."""
    shutil.rmtree(path.parent, ignore_errors=True)
