"""RunMetrics: the content of runs/NAME/metrics.json, the measurements of one finished training run.

This module is the only reader and writer of that file. It does not import torch, so that the report can read runs.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from extract.base.provenance import Provenance
from extract.base.record import Record


@dataclass(frozen=True)
class LayerError:
    """Distance between the predictions of one layer and the teacher's, as means over frames (and features)."""

    l1: float
    cosine: float  # similarity, -1 to 1
    mse: float


@dataclass(frozen=True)
class CodeScore:
    """Agreement of a student with one layer of the teacher, comparable between losses, as means over dev frames."""

    probe_mse: float  # behind a linear map that is fitted after training (train/probe.py)
    probe_accuracy: float  # share of frames whose nearest word, of that map's output, is the target's
    accuracy: float  # without the map: by the heads of the loss `codes`, with other losses nearest to the prediction


@dataclass(frozen=True)
class RunLoss:
    """Final losses of a run, in the units of its own loss."""

    train: float  # mean over the last 50 steps
    dev: float | None  # None: the corpus has no dev split
    dev_stored_stem: float | None  # dev loss from the stored stem; None: the run never read it


@dataclass(frozen=True)
class DevPoint:
    """Score of the dev split after `step` steps of the optimiser."""

    step: int
    seconds: float  # of the run so far, dev scores included
    loss: float
    by_layer: dict[int, LayerError]  # as `dev_by_layer` of the run


@dataclass(frozen=True)
class GrowthStep:
    """From optimiser step `step` on, the student had `layers` layers."""

    step: int
    layers: int


@dataclass(frozen=True)
class StoreScore:
    """Final dev loss of one of several stores of targets."""

    teacher: str  # fingerprint of the store
    weight: float  # share of its loss in that of the run
    dev: float | None  # in the units of its own loss; None: the corpus has no dev split
    dev_by_layer: dict[int, LayerError]


@dataclass(frozen=True, kw_only=True)
class RunMetrics(Record):
    """Measurements of one training run, and the settings and versions that produced them."""

    REMEDY = "`python -m train run`"

    student: str
    family: str
    teacher: str  # fingerprint of the store of the targets, or of the first one
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
    dev_by_layer: dict[int, LayerError]  # by layer of this teacher; empty without a dev split and with loss `codes`
    from_teacher: tuple[str, ...]  # parts initialised from the teacher
    not_from_teacher: dict[str, str]  # part -> reason
    growth: tuple[GrowthStep, ...]
    exposure_bias: float | None  # dev loss of free running minus that of teacher forcing; None without a history
    provenance: Provenance | None = None  # None: by a version that did not record it
    dev_teacher: str | None = None  # fingerprint of the store that dev is scored on; None: that of `teacher`
    stem_teacher: str | None = None  # fingerprint of the store of the stem; None: that of `teacher`, or waveforms
    dev_curve: tuple[DevPoint, ...] = ()  # every `dev_every` steps and at the end; empty without a dev split
    codes_by_layer: dict[int, CodeScore] = field(default_factory=dict)  # by teacher layer; empty without a codebook
    stores: dict[str, StoreScore] = field(default_factory=dict)  # by name; empty with one store

    def to_dict(self) -> dict[str, Any]:
        by_layer: dict[str, dict[int, Any]] = {"dev_by_layer": self.dev_by_layer, "codes_by_layer": self.codes_by_layer}
        # JSON's keys are text.
        value = super().to_dict() | {name: _by_text(errors) for name, errors in by_layer.items()}
        value["dev_curve"] = [asdict(point) | {"by_layer": _by_text(point.by_layer)} for point in self.dev_curve]
        value["stores"] = {
            name: asdict(store) | {"dev_by_layer": _by_text(store.dev_by_layer)} for name, store in self.stores.items()
        }
        return value


def _by_text(errors: dict[int, Any]) -> dict[str, Any]:
    return {str(layer): asdict(error) for layer, error in errors.items()}
