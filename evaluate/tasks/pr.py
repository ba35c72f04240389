"""Phone recognition: the phones of the lexicon's first pronunciations, stress kept, no silence inserted.

python -m evaluate run --task pr --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/pr.json
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evaluate.bootstrap import Metrics
from evaluate.checkpoint import TaskSession
from evaluate.ctc import Noise, Texts, Transcription, transcribe
from evaluate.heads import LinearHead
from evaluate.metrics import token_error_rate
from evaluate.ragged import Ragged
from evaluate.task import Features, FrameRecipe, SweepResult, Task


@dataclass(frozen=True, kw_only=True)
class PrRecipe(FrameRecipe):
    """Recipe of PR."""

    steps: int = 100_000
    projection: int = 256


class PhoneRecognition(Transcription[LinearHead]):
    """Transcription into phones with the linear head, measured by PER."""

    labels = ("phones",)
    metric = "per"

    def __init__(self, features: Features, recipe: PrRecipe) -> None:
        super().__init__(features, recipe)
        self.projection = recipe.projection

    @staticmethod
    def symbols(*labels: str) -> list[str]:
        return labels[0].split()

    @staticmethod
    def written(symbols: Sequence[str]) -> str:
        return " ".join(symbols)

    @staticmethod
    def rates(hypotheses: Texts, references: Texts) -> Metrics:
        return {"per": token_error_rate(hypotheses, references)}

    def new_head(self) -> LinearHead:
        classes = len(self.vocabulary.symbols)
        layers, dim = len(self.store.layers), self.store.dim
        return LinearHead(num_layers=layers, dim=dim, projection=self.projection, classes=classes)

    def logits(self, head: LinearHead, mixed_FD: Tensor, frames: Ragged, noise: Noise) -> Tensor:
        logits_FC: Tensor = head(mixed_FD)  # on concatenated frames: padding costs nothing
        return logits_FC[frames.rows_BT]


def score(features: Features, recipe: PrRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads."""
    return transcribe(PhoneRecognition(features, recipe), features, recipe, session)


PR = Task(
    name="pr",
    title="phoneme recognition",
    metric="per",
    higher_is_better=False,
    labels=PhoneRecognition.labels,
    reads="frames",
    unit_s=1.6e-3,
    recipe=PrRecipe,
    score=score,
    on_gpu=PhoneRecognition,
)
