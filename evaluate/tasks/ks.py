"""Keyword spotting: one of twelve words of Speech Commands v1, `_silence_` and `_unknown_` among them.

python -m evaluate run --task ks --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/ks.json
"""

from dataclasses import dataclass
from functools import partial

from evaluate.pooled import PooledRecipe, classify
from evaluate.task import Task

LABELS = ("keyword",)


@dataclass(frozen=True, kw_only=True)
class KsRecipe(PooledRecipe):
    """Recipe with balanced classes, as the reference: the corpus has few files of silence and many unknown words."""

    balanced: bool = True


KS = Task(
    name="ks",
    title="keyword spotting",
    metric="acc",
    higher_is_better=True,
    labels=LABELS,
    reads="pooled",
    unit_s=3.8e-5,
    recipe=KsRecipe,
    score=partial(classify, labels=LABELS),
    deviations=(
        "the silence class is the corpus's own utterances of noise; the reference draws random crops of noise files",
    ),
)
