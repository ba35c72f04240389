"""What a task is: its labels, what it reads of the store, its metric, its recipe, and the function that scores it.

A new task is one new file in evaluate/tasks/ and one line in the dict there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from evaluate.features import Source
from evaluate.recipe import Settings
from extract.base.validate import parse

if TYPE_CHECKING:  # both need torch, whose import takes seconds; --help and error lines do not
    from evaluate.checkpoint import Progress
    from evaluate.sweep import SweepResult

R = TypeVar("R", bound=Settings)


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
