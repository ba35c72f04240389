"""Records that a step yields, and the request that it reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Request of all steps: device, size and the folder of logs and results."""

    device: str
    tiny: bool  # shapes of the demo, for a test on a CPU; else the published ones
    folder: Path

    @property
    def work(self) -> Path:
        """Folder of models and stores, removed after each step."""
        return self.folder / "work"


@dataclass(frozen=True)
class Proof:
    """A figure that must not be above a bound."""

    name: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # False for nan


@dataclass(frozen=True)
class Row:
    """One row of a table: column -> cell."""

    table: str
    cells: dict[str, Any]


Steps = Iterator[Proof | Row]
