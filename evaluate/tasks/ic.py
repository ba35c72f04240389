"""Intent classification: action, object and location of a command, all three correct.

python -m evaluate run --task ic --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/ic.json
"""

from dataclasses import dataclass
from functools import partial

from evaluate.pooled import PooledRecipe, classify
from evaluate.task import Task

LABELS = ("action", "object", "location")


@dataclass(frozen=True, kw_only=True)
class IcRecipe(PooledRecipe):
    """Recipe of IC."""

    dev_evaluations: int = 50


IC = Task(
    name="ic",
    title="intent classification",
    metric="acc",
    higher_is_better=True,
    labels=LABELS,
    reads="pooled",
    unit_s=3.8e-5,
    recipe=IcRecipe,
    score=partial(classify, labels=LABELS),
)
