"""Phone recognition: the phones of the lexicon's first pronunciations, stress kept, no silence inserted.

python -m evaluate run --task pr --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/pr.json
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evaluate.checkpoint import Progress
from evaluate.ctc import Noise, Transcription, read_transcripts
from evaluate.features import Source
from evaluate.frames import FrameReader
from evaluate.heads import LinearHead, Ragged
from evaluate.metrics import token_error_rate
from evaluate.recipe import Recipe
from evaluate.sweep import SweepResult, sweep
from evaluate.task import Task


@dataclass(frozen=True, kw_only=True)
class PrRecipe(Recipe):
    """`memory_gb`: frames kept in memory as stored; what is beyond is read again every epoch."""

    steps: int = 100_000
    projection: int = 256
    memory_gb: float = 2.0


def rates(hypotheses: list[Sequence[str]], references: list[Sequence[str]]) -> dict[str, float]:
    return {"per": token_error_rate(hypotheses, references)}


def logits(head: LinearHead, mixed_FD: Tensor, frames: Ragged, noise: Noise) -> Tensor:
    """(F, D) -> (B, T, C): on the frames end to end, so that padding costs nothing."""
    logits_FC: Tensor = head(mixed_FD)
    return logits_FC[frames.rows_BT]


def problem(source: Source, recipe: PrRecipe) -> Transcription[LinearHead]:
    vocabulary, splits = read_transcripts(source, ("phones",), str.split, recipe.batch_size)
    return Transcription(
        FrameReader(source.reader, recipe.memory_gb),
        splits,
        vocabulary,
        metric="per",
        rates=rates,
        new_head=lambda: LinearHead(
            num_layers=len(source.reader.layers),
            dim=source.reader.dim,
            projection=recipe.projection,
            classes=len(vocabulary.symbols),
        ),
        logits=logits,
    )


def score(source: Source, recipe: PrRecipe, progress: Progress) -> SweepResult:
    return sweep(problem(source, recipe), recipe, progress)


PR = Task(
    name="pr",
    title="phone recognition",
    metric="per",
    higher_is_better=False,
    labels=("phones",),
    reads="frames",
    recipe=PrRecipe,
    score=score,
)
