"""RunMetrics: the content of runs/NAME/metrics.json, the measurements of one finished training run.

This module is the only reader and writer of that file. It does not import torch, so that the report can read runs.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.files import read_json, write_json
from extract.base.validate import parse

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerError:
    """Distance between the predictions of one layer and the teacher's, as means over frames (and features)."""

    l1: float
    cosine: float  # similarity, -1 to 1
    mse: float


@dataclass(frozen=True)
class RunLoss:
    """Final losses of a run, in the units of its family's loss."""

    train: float  # mean over the last 50 steps
    dev: float | None  # None: the corpus has no dev split
    dev_stored_stem: float | None  # dev loss from the stored stem; None: the run never read it


@dataclass(frozen=True)
class GrowthStep:
    """From optimiser step `step` on, the student had `layers` layers."""

    step: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """Measurements of one training run, and the settings and versions that produced them."""

    student: str
    family: str
    teacher: str  # fingerprint of the store
    seed: int
    config: dict[str, Any]  # the whole StudentConfig
    versions: dict[str, str]  # by library
    params: int  # of the saved student
    training_params: int  # with the heads that only training needs
    steps: int  # of the optimiser
    epochs: float
    seconds: float
    audio_seconds_per_second: float
    loader_wait_share: float  # share of `seconds` spent waiting for batches
    processes: int
    loss: RunLoss
    dev_by_layer: dict[int, LayerError]  # by teacher layer; empty without a dev split
    from_teacher: tuple[str, ...]  # parts initialised from the teacher
    not_from_teacher: dict[str, str]  # part -> reason
    growth: tuple[GrowthStep, ...]
    exposure_bias: float | None  # dev loss of free running minus that of teacher forcing; None without a history

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value of the file."""
        errors = {str(layer): asdict(error) for layer, error in self.dev_by_layer.items()}
        return asdict(self) | {"format_version": FORMAT_VERSION, "dev_by_layer": errors}

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, path: Path) -> "RunMetrics":
        """Return the metrics of a JSON value. Raises RetortError, which names the field, unless every field fits."""
        fields = dict(value)
        version = fields.pop("format_version", None)
        try:
            if version != FORMAT_VERSION:
                raise RetortError(f"{path}.format_version: got {version!r}, expected {FORMAT_VERSION}")
            return parse(cls, fields, where=str(path))
        except RetortError as error:
            raise RetortError(f"{error}; train the student again to write the file anew") from None

    @classmethod
    def read(cls, path: Path) -> "RunMetrics":
        """Read a metrics file. Raises RetortError if it does not exist or does not fit."""
        return cls.from_dict(read_json(path), path=path)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.to_dict())
