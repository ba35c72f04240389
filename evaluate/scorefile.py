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
class HeadScore:
    """Metrics of the head of one seed, in percent; of several folds the means."""

    seed: int
    dev: float
    test: dict[str, float]  # by name: the metric of the score, and the further ones


@dataclass(frozen=True)
class Example:
    """Test utterance with its transcript, and the hypothesis of the first seed's head."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Interval:
    """Intervals, low and high in percent: of the test metric and of the metrics in `also`.

    They cover the test set and the seeds of the heads together (`evaluate.bootstrap`), `test_set` the test set alone.
    `test` and `test_set` are None for a metric without an interval. `of` names the resampled unit, such as utterances.
    """

    test: tuple[float, float] | None
    test_set: tuple[float, float] | None
    also: dict[str, tuple[float, float]]
    of: str | None
    level_percent: int
    resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ScoreFile(Record):
    """Result of one upstream on one task. Learning rate and checkpoints are chosen on dev; test is measured once.

    Metrics are in percent; `test`, `also`, `dev` and `layer_weights` are means over `heads`. `chosen_lr` is None for a
    task without a head, which chooses a layer instead and has no `heads`.
    """

    FORMAT_VERSION = 3
    REMEDY = "`python -m evaluate run` or `python -m evaluate many`"

    task: str
    upstream: str
    metric: str
    higher_is_better: bool
    unit: str
    test: float
    also: dict[str, float]  # further metrics on test, by name
    interval: Interval
    heads: tuple[HeadScore, ...]  # one for each head seed
    sd: dict[str, float]  # standard deviation over heads (n - 1) of test metrics, by name; empty for one head
    chance: float  # of a system that ignores the audio: classes at random, an empty transcript, ...
    dev: float
    chosen_lr: float | None
    grid: tuple[GridPoint | LayerPoint, ...]  # of the first seed
    seed: int  # the first one
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
    examples: tuple[Example, ...]  # first utterances of test, of tasks that transcribe
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
