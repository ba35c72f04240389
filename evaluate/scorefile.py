"""Score file: the JSON record of one upstream on one task, scores/UPSTREAM/TASK.json.

`ScoreFile` is the only writer and reader of this format. It imports no torch, so that tables and reports start fast.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError
from extract.base.files import read_json, write_json
from extract.base.validate import parse

FORMAT_VERSION = 2
_AGAIN = "score again with `python -m evaluate run` or `python -m evaluate many`"


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
class ScoreFile:
    """Result of one upstream on one task. Learning rate and checkpoint are chosen on dev; test is measured once.

    Metrics are in percent. `chosen_lr` is None for a task without a head, which chooses a layer instead.
    """

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

    @property
    def heaviest_layer(self) -> int:
        """Layer with the largest weight; of equals the highest."""
        return max(zip(self.layer_weights, self.layers, strict=True))[1]

    @property
    def chosen(self) -> float:
        """Learning rate that dev chose, or the layer."""
        return self.heaviest_layer if self.chosen_lr is None else self.chosen_lr

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, path: Path) -> "ScoreFile":
        """Parse a score file's content: all fields, no other, each of its type.

        Raises RetortError that names `path` and the field.
        """
        content = dict(value)
        if (found := content.pop("format_version", None)) != FORMAT_VERSION:
            raise RetortError(f"{path}: format_version is {found!r}, expected {FORMAT_VERSION}; {_AGAIN}")
        try:
            score = parse(cls, content, where=str(path))
        except RetortError as error:
            raise RetortError(f"{error}; {_AGAIN}") from None
        if not score.layers or len(score.layers) != len(score.layer_weights):
            raise RetortError(
                f"{path}: {len(score.layer_weights)} layer_weights for {len(score.layers)} layers, expected one each; "
                f"{_AGAIN}"
            )
        return score

    @classmethod
    def read(cls, path: Path) -> "ScoreFile":
        """Read a score file. Raises RetortError if it is missing or invalid."""
        return cls.from_dict(read_json(path), path=path)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.to_dict())
