"""Speaker identification: the training speaker of an utterance.

python -m evaluate run --task sid --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/sid.json
"""

from functools import partial

from evaluate.pooled import PooledRecipe, classify
from evaluate.task import SPEAKER, Task

LABELS = (SPEAKER,)

SID = Task(
    name="sid",
    title="speaker identification",
    metric="acc",
    higher_is_better=True,
    labels=LABELS,
    reads="pooled",
    unit_s=3.8e-5,
    recipe=PooledRecipe,
    score=partial(classify, labels=LABELS),
    deviations=("trains on whole utterances; the reference crops them at random to 8 s",),
)
