"""Emotion recognition: neutral, happy, angry or sad, in five folds by session.

python -m evaluate run --task er --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/er.json
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.checkpoint import TaskSession
from evaluate.pooled import PooledMeans, PooledRecipe, pooled_problem
from evaluate.sweep import cross_validate
from evaluate.task import Features, SweepResult, Task
from extract.base.errors import RetortError

LABELS = ("emotion",)
DEV_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class ErRecipe(PooledRecipe):
    """Recipe of one fold: steps and dev evaluations. The reference's batch of 32 is eight of 4, accumulated."""

    steps: int = 30_000
    dev_evaluations: int = 30


def folds(features: Features) -> Iterator[dict[str, NDArray[np.int64]]]:
    """Yield train, dev and test of each fold as corpus indices. Every split of the corpus is a session, and once test.

    Dev is a random fifth of the other sessions, drawn with the reference's seed whatever the recipe's. Raises
    RetortError if there is only one session.
    """
    names = sorted(set(features.corpus.splits))
    if len(names) < 2:
        raise RetortError(f"corpus {features.corpus.name} has one split, {names[0]}: folds need two sessions or more")
    sessions = {name: features.select(name) for name in names}
    for test in names:
        others = np.concatenate([rows for name, rows in sessions.items() if name != test])
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).numpy()
        first_of_dev = int((1 - DEV_SHARE) * len(others))
        yield {"train": others[order[:first_of_dev]], "dev": others[order[first_of_dev:]], "test": sessions[test]}


def score(features: Features, recipe: ErRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads of all folds."""
    every = list(folds(features))
    means = PooledMeans.read(features, every[0].values())  # a fold has all sessions
    problems = [pooled_problem(features, means, LABELS, rows, recipe) for rows in every]
    return cross_validate(problems, recipe, session)


ER = Task(
    name="er",
    title="emotion recognition",
    metric="acc",
    higher_is_better=True,
    labels=LABELS,
    reads="pooled",
    unit_s=1.7e-4,
    recipe=ErRecipe,
    score=score,
    deviations=(
        "dev is a random fifth of a fold's training sessions as in the reference, drawn from this corpus's order; "
        "the reference draws from that of its own lists",
    ),
)
