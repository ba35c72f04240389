"""Definition of a task: its record, recipe, features and result, and the task section of params.yaml.

A new task is one new file in evaluate/tasks/ and one line in the dict there. This module imports no torch, whose import
takes seconds that --help, the report and error lines do not need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluate.bootstrap import Metrics, mean_of_heads, means
from evaluate.scorefile import Example, GridPoint, LayerPoint
from extract.base.errors import RetortError, unknown
from extract.base.params import configured, merge, read_section
from extract.base.validate import parse

if TYPE_CHECKING:
    from evaluate.checkpoint import TaskSession
    from evaluate.heads import Head
    from extract.corpus import Corpus
    from extract.store.reader import StoreReader

SPEAKER = "speaker"
PROFILES = Path(__file__).parent / "profiles"
RUN_ONLY = frozenset({"memory_gb"})  # recipe fields that change the use of memory, not the score


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Recipe fields of every task; those of trained tasks are in `Recipe`. Defaults are the reference's values."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RetortError(f"seed is {self.seed}, expected 0 or more")

    @property
    def amount(self) -> float:
        """Return the total of the task's progress: optimiser steps, or 1 for a task without a head."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Recipe fields of trained tasks: Adam (AdamW with `weight_decay`), no schedule, best checkpoint on dev.

    A batch holds `batch_size` whole utterances. The first seed sweeps all rates; `head_seeds` counts it and those after
    it, seed + 1, seed + 2, ..., which are trained at the rate that it chose.
    """

    head_seeds: int = 1
    learning_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    steps: int = 200_000
    batch_size: int = 32
    dev_evaluations: int = 100  # evenly spaced over the steps, the last one at the end
    clip_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_seeds", "steps", "batch_size", "dev_evaluations", "clip_norm"):
            if getattr(self, name) <= 0:
                raise RetortError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise RetortError("learning_rates must be a list of one or more numbers above 0")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise RetortError("learning_rates names a rate twice")
        if self.weight_decay < 0:
            raise RetortError(f"weight_decay is {self.weight_decay}, expected 0 or more")

    @property
    def num_heads(self) -> int:
        """Return the number of heads that are trained: every rate once, and the chosen one with the other seeds."""
        return len(self.learning_rates) + self.head_seeds - 1

    @property
    def amount(self) -> float:
        return self.steps * self.num_heads / len(self.learning_rates)


@dataclass(frozen=True, kw_only=True)
class FrameRecipe(Recipe):
    """Recipe fields of tasks on frames. `memory_gb`: packs kept in memory as stored; others are read in every epoch."""

    memory_gb: float = 2.0


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Features:
    """Features of one upstream for one corpus, with the corpus's labels. `device`: where heads train."""

    reader: "StoreReader"
    corpus: "Corpus"
    device: str = "cpu"  # or cuda, cuda:N

    def select(self, split: str) -> NDArray[np.int64]:
        """Return corpus indices of a split's utterances that are in the store, int64 (utterances,).

        Raises RetortError if the store holds none of them, and if it holds parts of one, which have no labels.
        """
        chosen = self.corpus.select(split)
        kept = chosen[self.reader.pack_of[chosen] >= 0]
        if not len(kept):
            raise RetortError(
                f"{self.reader.source} holds no utterance of split {split!r} of corpus {self.corpus.name}: all were "
                "dropped as longer than a pack or shorter than a frame; extract again with a larger --pack-frames"
            )
        if len(parts := kept[self.corpus.is_part[kept]]):
            raise RetortError(
                f"{self.reader.source} holds {self.corpus.ids[parts[0]]!r}, a part of an utterance of split {split!r} "
                f"({len(parts)} such), and scores need whole utterances; extract again without --cut-long, with a "
                "larger --pack-frames"
            )
        return kept

    def train_dev_test(self) -> dict[str, NDArray[np.int64]]:
        """Return `select` of each of the three splits."""
        return {split: self.select(split) for split in ("train", "dev", "test")}

    def labels(self, name: str, indices: NDArray[np.int64]) -> list[str]:
        """Return one label of the utterances at `indices`; `speaker` is a column of every corpus.

        Raises RetortError that lists the corpus's labels if it lacks this one.
        """
        if name == SPEAKER:
            column = self.corpus.speakers
        elif name in self.corpus.labels:
            column = self.corpus.labels[name]  # `label` refuses a corpus with parts; `select` refuses the parts alone
        else:
            column = self.corpus.label(name)
        return [column[index] for index in indices]


@dataclass(frozen=True)
class HeadResult:
    """Metrics of the chosen head of one seed. `checkpoints`: at every dev evaluation, of all rates that it trained."""

    seed: int
    dev: float
    test: Metrics
    checkpoints: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class SweepResult:
    """Choice made on dev, and its test metrics.

    A task without a head has no learning rate: its grid holds the layers, the chosen one has all the weight, and
    `heads` has one entry.
    """

    chosen_lr: float | None
    heads: tuple[HeadResult, ...]
    grid: tuple[GridPoint, ...] | tuple[LayerPoint, ...]
    layer_weights: tuple[float, ...]
    num_test: int
    chance: float  # of the metric, on test, for a system that ignores the audio
    notes: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    first_head: "Head | None" = field(default=None, compare=False, repr=False)  # of the first seed and fold

    @property
    def dev(self) -> float:
        """Return the mean of the dev metric over heads."""
        return fmean(head.dev for head in self.heads)

    @property
    def test(self) -> Metrics:
        """Return the mean of every test metric over heads."""
        return means([head.test for head in self.heads], mean_of_heads)


@dataclass(frozen=True, kw_only=True)
class Task(Generic[S]):
    """One SUPERB task. `score` trains heads and measures them."""

    name: str
    title: str
    metric: str  # in percent; chooses on dev and is reported on test
    higher_is_better: bool
    labels: tuple[str, ...]  # columns that the corpus must have; `speaker` is in every corpus
    reads: Literal["pooled", "frames"]  # array of the store
    recipe: type[S]
    score: "Callable[[Features, S, TaskSession], SweepResult]"
    deviations: tuple[str, ...] = ()  # from the reference, whatever the recipe
    # `sweep.Problem` of heads that train on the GPU of --device; None: they are too small for one, or there are none.
    on_gpu: "Callable[[Features, S], Any] | None" = None
    unit_s: float = 1e-3  # seconds of a unit of work (evaluate/time_left.py) in the demo: a guess, soon corrected

    def parse_recipe(self, section: object, *, where: str) -> S:
        """Parse the task's section of params.yaml; None and missing keys keep the reference's values.

        Raises RetortError that names the key, its value, the expected type and the valid keys.
        """
        return parse(self.recipe, {} if section is None else section, where=where)


def differences(recipe: Settings) -> list[str]:
    """Return one note for each field of the recipe that differs from the reference's value."""
    reference = type(recipe)()
    return [
        f"{name} {_plain(getattr(recipe, name))} (reference {_plain(getattr(reference, name))})"
        for name in (one.name for one in fields(recipe))
        if name not in {"seed", "head_seeds", *RUN_ONLY} and getattr(recipe, name) != getattr(reference, name)
    ]


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{item:g}" for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_recipes(config: Path) -> dict[str, Any]:
    """Return section `evaluate` of a params file, over the recipes of the profile that its key `profile` names.

    Without that key the profile is `published`. Raises RetortError that lists the profiles for an unknown one.
    """
    section = read_section(config, "evaluate")
    name, valid = section.pop("profile", "published"), sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in valid:
        raise unknown(f"evaluate.profile of {config}", str(name), valid)
    return merge(read_section(PROFILES / f"{name}.yaml", "evaluate"), section)


def corpus_of_tasks(params: dict[str, Any], path: Path) -> dict[str, str]:
    """Return the corpus of each task that is scored, in the order of section `tasks` of params.yaml.

    Tasks of corpora that are not configured are left out (`not_scored`). Raises RetortError unless `tasks` gives each
    corpus a list of tasks, and each task one corpus.
    """
    scored = configured(_tasks_section(params, path), "tasks", params, path)
    return {task: corpus for corpus, tasks in scored.items() for task in tasks}


def not_scored(params: dict[str, Any], path: Path) -> str | None:
    """Return a line that names the tasks whose corpus is not configured, None if there are none."""
    section = _tasks_section(params, path)
    scored = configured(section, "tasks", params, path)
    left_out = [
        f"{', '.join(map(str.upper, tasks))} (corpus {corpus} is not configured)"
        for corpus, tasks in section.items()
        if tasks and corpus not in scored
    ]
    return f"not scored: {', '.join(left_out)}" if left_out else None


def _tasks_section(params: dict[str, Any], path: Path) -> dict[str, list[str]]:
    section = params.get("tasks")
    if not isinstance(section, dict) or not all(
        isinstance(tasks, list) and all(isinstance(task, str) for task in tasks) for tasks in section.values()
    ):
        raise RetortError(f"{path}: `tasks` is {section!r}, expected a list of tasks for each corpus")
    named = [task for tasks in section.values() for task in tasks]
    if len(set(named)) < len(named):
        raise RetortError(f"{path}: `tasks` names a task twice; each is scored on one corpus")
    return section
