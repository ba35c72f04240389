"""What a task is: its labels, what it reads of the store, its metric, its recipe, and the function that scores it.

A new task is one new file in evaluate/tasks/ and one line in the dict there. Its recipe is a frozen dataclass whose
defaults are the reference's values; `evaluate:` in params.yaml overrides them, and every difference is noted beside
the score.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from extract.corpus import Corpus
from extract.errors import RetortError
from extract.params import parse
from extract.store import StoreReader

if TYPE_CHECKING:  # the sweep needs torch, whose import takes seconds; --help and error lines do not
    from evaluate.checkpoint import Checkpoint
    from evaluate.sweep import SweepResult


class Progress(Protocol):
    """A task under way; `evaluate.checkpoint.Sitting` is one."""

    def advance(self, amount: float, *, detail: str = "") -> None:
        """Told after every step."""
        ...

    def skip(self, amount: float) -> None:
        """Told of steps that an earlier sitting took."""
        ...

    def next_sweep(self) -> "Checkpoint | None":
        """Where the sweep that begins now keeps its state; None keeps nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every task shares; what only trained ones do is in `Recipe`."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RetortError(f"seed is {self.seed}, expected 0 or more")

    @property
    def amount(self) -> float:
        """What a whole run tells its `Progress`."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """What every trained task shares. Batches hold whole utterances; Adam, no schedule, best dev checkpoint.

    `weight_decay` is AdamW's.
    """

    learning_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    steps: int = 200_000
    batch_size: int = 32
    dev_evaluations: int = 100  # evenly spaced over the steps, the last one at the end
    clip_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "dev_evaluations", "clip_norm"):
            if getattr(self, name) <= 0:
                raise RetortError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise RetortError("learning_rates must be a list of one or more numbers above 0")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise RetortError("learning_rates names a rate twice")
        if self.weight_decay < 0:
            raise RetortError(f"weight_decay is {self.weight_decay}, expected 0 or more")

    @property
    def amount(self) -> float:
        return self.steps


R = TypeVar("R", bound=Settings)
SPEAKER = "speaker"


@dataclass(frozen=True)
class Source:
    """One upstream's features of one corpus, with the labels. Opened and checked by `evaluate.run`."""

    reader: StoreReader
    corpus: Corpus

    def select(self, split: str) -> NDArray[np.int64]:
        """Corpus indices of a split's utterances that the store has, int64 (utterances,)."""
        chosen = self.corpus.select(split)
        kept = chosen[self.reader.pack_of[chosen] >= 0]
        if not len(kept):
            raise RetortError(
                f"{self.reader.source} holds no utterance of split {split!r} of corpus {self.corpus.name}: all were "
                "dropped as longer than a pack; extract again with a larger --pack-frames"
            )
        return kept

    def train_dev_test(self) -> dict[str, NDArray[np.int64]]:
        """`select` of each of the three."""
        return {split: self.select(split) for split in ("train", "dev", "test")}

    def labels(self, name: str, indices: NDArray[np.int64]) -> list[str]:
        """One label of the utterances at `indices`; `speaker` is every corpus's own column.

        Raises RetortError naming the labels there are.
        """
        column = self.corpus.speakers if name == SPEAKER else self.corpus.label(name)
        return [column[index] for index in indices]


@dataclass(frozen=True, kw_only=True)
class Task(Generic[R]):
    """One SUPERB task. `score` trains and measures; everything else is fact about it."""

    name: str
    title: str
    metric: str  # the metric that selects on dev and is reported on test, in percent
    higher_is_better: bool
    labels: tuple[str, ...]  # of every utterance; `speaker` is a column that every corpus has
    reads: Literal["pooled", "frames"]
    recipe: type[R]
    score: "Callable[[Source, R, Progress], SweepResult]"
    deviations: tuple[str, ...] = ()  # from the reference, whatever the recipe


def parse_recipe(task: Task[R], section: object, *, where: str) -> R:
    """One task's section of params.yaml -> its recipe; None and missing keys keep the reference's values.

    Raises RetortError that names the key, what it is, what was expected and the valid keys.
    """
    return parse(task.recipe, {} if section is None else section, where=where)


def differences(recipe: Settings) -> list[str]:
    """What this run's recipe changes of the reference's, one note a field; nothing where they agree."""
    reference = type(recipe)()
    own = {"seed", *RUN_ONLY}
    return [
        f"{field.name} {_plain(getattr(recipe, field.name))} (reference {_plain(getattr(reference, field.name))})"
        for field in fields(recipe)
        if field.name not in own and getattr(recipe, field.name) != getattr(reference, field.name)
    ]


RUN_ONLY = frozenset({"memory_gb"})  # how a run is done, not what it computes


def recipe_dict(recipe: Settings) -> dict[str, Any]:
    """A recipe as JSON values, for the score file."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{item:g}" for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
