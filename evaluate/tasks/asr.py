"""Speech recognition: characters by CTC, greedy, no language model; words are scored.

python -m evaluate run --task asr --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/asr.json
"""

from collections.abc import Sequence

from evaluate.bootstrap import Metrics
from evaluate.checkpoint import TaskSession
from evaluate.ctc import WITHOUT_WARPING, RecurrentRecipe, RecurrentTranscription, Texts, transcribe
from evaluate.metrics import character_error_rate, word_error_rate
from evaluate.task import Features, SweepResult, Task


def characters(text: str) -> list[str]:
    """Return a transcript's characters in upper case, with one space between words."""
    return list(" ".join(text.upper().split()))


class SpeechRecognition(RecurrentTranscription):
    """Transcription into characters, measured by WER and CER."""

    labels = ("text",)
    metric = "wer"

    @staticmethod
    def symbols(*labels: str) -> list[str]:
        return characters(labels[0])

    @staticmethod
    def written(symbols: Sequence[str]) -> str:
        return "".join(symbols)

    @staticmethod
    def rates(hypotheses: Texts, references: Texts) -> Metrics:
        decoded, spoken = (["".join(symbols) for symbols in texts] for texts in (hypotheses, references))
        return {"wer": word_error_rate(decoded, spoken), "cer": character_error_rate(decoded, spoken)}


def score(features: Features, recipe: RecurrentRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads."""
    return transcribe(SpeechRecognition(features, recipe), features, recipe, session)


ASR = Task(
    name="asr",
    title="speech recognition",
    metric="wer",
    higher_is_better=False,
    labels=SpeechRecognition.labels,
    reads="frames",
    unit_s=8.7e-3,
    recipe=RecurrentRecipe,
    score=score,
    on_gpu=SpeechRecognition,
    deviations=(WITHOUT_WARPING,),
)
