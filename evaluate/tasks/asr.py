"""Speech recognition: characters by CTC, greedy, no language model; words scored.

python -m evaluate run --task asr --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/asr.json
"""

from collections.abc import Sequence

from evaluate.checkpoint import Progress
from evaluate.features import Source
from evaluate.metrics import character_error_rate, word_error_rate
from evaluate.recurrent import DEVIATIONS, RecurrentRecipe, recurrent_problem
from evaluate.sweep import SweepResult, sweep
from evaluate.task import Task

LABELS = ("text",)


def characters(text: str) -> list[str]:
    """A transcript in upper case -> its characters, one space between words."""
    return list(" ".join(text.upper().split()))


def rates(hypotheses: list[Sequence[str]], references: list[Sequence[str]]) -> dict[str, float]:
    said, meant = (["".join(symbols) for symbols in texts] for texts in (hypotheses, references))
    return {"wer": word_error_rate(said, meant), "cer": character_error_rate(said, meant)}


def score(source: Source, recipe: RecurrentRecipe, progress: Progress) -> SweepResult:
    problem = recurrent_problem(source, recipe, labels=LABELS, symbols=characters, metric="wer", rates=rates)
    return sweep(problem, recipe, progress)


ASR = Task(
    name="asr",
    title="speech recognition",
    metric="wer",
    higher_is_better=False,
    labels=LABELS,
    reads="frames",
    recipe=RecurrentRecipe,
    score=score,
    deviations=DEVIATIONS,
)
