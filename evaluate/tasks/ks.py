"""Keyword spotting: one of twelve words of Speech Commands v1, `_silence_` and `_unknown_` among them.

python -m evaluate run --task ks --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/ks.json
"""

from dataclasses import dataclass

from evaluate.checkpoint import Progress
from evaluate.features import Source
from evaluate.pooled import PooledRecipe, classify
from evaluate.sweep import SweepResult
from evaluate.task import Task


@dataclass(frozen=True, kw_only=True)
class KsRecipe(PooledRecipe):
    """The reference draws its classes equally often: the corpus has few files of silence and many unknown words."""

    balanced: bool = True


def score(source: Source, recipe: KsRecipe, progress: Progress) -> SweepResult:
    return classify(source, ("keyword",), recipe, progress)


KS = Task(
    name="ks",
    title="keyword spotting",
    metric="acc",
    higher_is_better=True,
    labels=("keyword",),
    reads="pooled",
    recipe=KsRecipe,
    score=score,
    deviations=(
        "the silence class is the corpus's own utterances of noise; the reference draws random crops of noise files",
    ),
)
