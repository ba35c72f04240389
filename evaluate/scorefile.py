"""Score file: the JSON record of one upstream on one task, scores/UPSTREAM/TASK.json.

`ScoreFile` is the only writer and reader of this format. It imports no torch, so that tables and reports start fast.
"""

from dataclasses import dataclass

from extract.base.errors import RetortError
from extract.base.provenance import Provenance
from extract.base.record import Record


@dataclass(frozen=True)
class GridPoint:
    """One learning rate: its best dev metric and the step that reached it; for several folds the means."""

    lr: float
    dev: float
    steps: int

    @property
    def at(self) -> float:
        """Value that the grid varies."""
        return self.lr


@dataclass(frozen=True)
class LayerPoint:
    """One layer of a task without a head, and its dev metric."""

    layer: int
    dev: float

    @property
    def at(self) -> float:
        """Value that the grid varies."""
        return self.layer


@dataclass(frozen=True)
class Interval:
    """Bootstrap intervals, low and high in percent: of the test metric and of the metrics in `also`.

    `test` is None for a metric without an interval. `of` names the resampled unit, such as utterances.
    """

    test: tuple[float, float] | None
    also: dict[str, tuple[float, float]]
    of: str | None
    level_percent: int
    resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ScoreFile(Record):
    """Result of one upstream on one task. Learning rate and checkpoint are chosen on dev; test is measured once.

    Metrics are in percent. `chosen_lr` is None for a task without a head, which chooses a layer instead.
    """

    FORMAT_VERSION = 2
    REMEDY = "`python -m evaluate run` or `python -m evaluate many`"

    task: str
    upstream: str
    metric: str
    higher_is_better: bool
    unit: str
    test: float
    also: dict[str, float]  # further metrics on test, by name
    interval: Interval
    dev: float
    chosen_lr: float | None
    grid: tuple[GridPoint | LayerPoint, ...]
    seed: int
    layers: tuple[int, ...]  # hidden states in the store
    layer_weights: tuple[float, ...]  # one weight for each of `layers`, sum 1
    num_test: int
    fingerprint: str  # of the upstream
    store_digest: str
    corpus: str
    corpus_digest: str
    labels_digest: str
    recipe: dict[str, bool | int | float | tuple[float, ...]]
    code: str  # digest of the code that made the score
    versions: dict[str, str]
    notes: tuple[str, ...]  # deviations from the reference recipe
    seconds: float
    provenance: Provenance | None = None  # None: by a version that did not record it

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.layer_weights):
            raise RetortError(
                f"layer_weights: got {len(self.layer_weights)}, expected one for each of {len(self.layers)} layers"
            )

    @property
    def heaviest_layer(self) -> int:
        """Layer with the largest weight; of equals the highest."""
        return max(zip(self.layer_weights, self.layers, strict=True))[1]

    @property
    def chosen(self) -> float:
        """Learning rate that dev chose, or the layer."""
        return self.heaviest_layer if self.chosen_lr is None else self.chosen_lr
