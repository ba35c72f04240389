"""Phone recognition: the phones of the lexicon's first pronunciations, stress kept, no silence inserted.

python -m evaluate run --task pr --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/pr.json
"""

from dataclasses import dataclass

from torch import Tensor

from evaluate.batches import FrameReader
from evaluate.checkpoint import TaskSession
from evaluate.ctc import Noise, Texts, Transcription, read_transcripts
from evaluate.heads import LinearHead, Ragged
from evaluate.metrics import token_error_rate
from evaluate.sweep import Metrics, SweepResult, sweep
from evaluate.task import Features, Recipe, Task

LABELS = ("phones",)


@dataclass(frozen=True, kw_only=True)
class PrRecipe(Recipe):
    """Recipe of PR. `memory_gb`: packs kept in memory as stored; the others are read again in every epoch."""

    steps: int = 100_000
    projection: int = 256
    memory_gb: float = 2.0


def rates(hypotheses: Texts, references: Texts) -> Metrics:
    """Return the PER of transcripts given as phones."""
    return {"per": token_error_rate(hypotheses, references)}


def logits(head: LinearHead, mixed_FD: Tensor, frames: Ragged, noise: Noise) -> Tensor:
    """Map weighted sums (F, D) to logits (B, T, C). The head runs on concatenated frames: padding costs nothing."""
    logits_FC: Tensor = head(mixed_FD)
    return logits_FC[frames.rows_BT]


def problem(features: Features, recipe: PrRecipe) -> Transcription[LinearHead]:
    """Return the problem of PR: CTC with the linear head."""
    vocabulary, splits = read_transcripts(features, LABELS, str.split, recipe.batch_size)
    reader = features.reader
    return Transcription(
        FrameReader(reader, recipe.memory_gb),
        splits,
        vocabulary,
        metric="per",
        rates=rates,
        new_head=lambda: LinearHead(
            num_layers=len(reader.layers),
            dim=reader.dim,
            projection=recipe.projection,
            classes=len(vocabulary.symbols),
        ),
        logits=logits,
    )


def score(features: Features, recipe: PrRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads."""
    return sweep(problem(features, recipe), recipe, session)


PR = Task(
    name="pr",
    title="phone recognition",
    metric="per",
    higher_is_better=False,
    labels=LABELS,
    reads="frames",
    recipe=PrRecipe,
    score=score,
)
