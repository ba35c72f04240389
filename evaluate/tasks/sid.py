"""Speaker identification: who of the training speakers says the utterance.

python -m evaluate run --task sid --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/sid.json
"""

from evaluate.checkpoint import Progress
from evaluate.features import Source
from evaluate.pooled import PooledRecipe, classify
from evaluate.sweep import SweepResult
from evaluate.task import Task


def score(source: Source, recipe: PooledRecipe, progress: Progress) -> SweepResult:
    return classify(source, ("speaker",), recipe, progress)


SID = Task(
    name="sid",
    title="speaker identification",
    metric="acc",
    higher_is_better=True,
    labels=("speaker",),
    reads="pooled",
    recipe=PooledRecipe,
    score=score,
    deviations=("trains on whole utterances; the reference crops them at random to 8 s",),
)
