"""Intent classification: the action, the object and the location of a command, all three right.

python -m evaluate run --task ic --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/ic.json
"""

from dataclasses import dataclass

from evaluate.checkpoint import Progress
from evaluate.features import Source
from evaluate.pooled import PooledRecipe, classify
from evaluate.sweep import SweepResult
from evaluate.task import Task

LABELS = ("action", "object", "location")


@dataclass(frozen=True, kw_only=True)
class IcRecipe(PooledRecipe):
    dev_evaluations: int = 50


def score(source: Source, recipe: IcRecipe, progress: Progress) -> SweepResult:
    return classify(source, LABELS, recipe, progress)


IC = Task(
    name="ic",
    title="intent classification",
    metric="acc",
    higher_is_better=True,
    labels=LABELS,
    reads="pooled",
    recipe=IcRecipe,
    score=score,
)
