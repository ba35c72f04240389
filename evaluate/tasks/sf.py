"""Slot filling: characters, with a token where a slot begins and one where it ends, by CTC.

    python -m evaluate run --task sf --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/sf.json

PLAY BLUE SKIES with slots O track track is the target sequence P L A Y _ B-track B L U E _ S K I E S E-track.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from evaluate.bootstrap import Metrics
from evaluate.checkpoint import TaskSession
from evaluate.ctc import WITHOUT_WARPING, RecurrentRecipe, RecurrentTranscription, Texts, transcribe
from evaluate.metrics import Slots, slot_type_f1, slot_value_cer
from evaluate.task import Features, SweepResult, Task
from extract.base.errors import RetortError

BEGIN, END = "B-", "E-"
OUTSIDE = "O"
PUNCTUATION = frozenset("?!.,;-")  # separate words in the published transcripts


@dataclass(frozen=True, kw_only=True)
class SfRecipe(RecurrentRecipe):
    """Recipe of SF: adaptive SpecAugment."""

    time_mask_ratio: float = 0.04


def encode(text: str, slots: str) -> list[str]:
    """Return characters and slot tokens of words and their slot types (or O). Neighbours of one type are one slot.

    Separate punctuation is dropped and & becomes AND, as in the reference. Raises RetortError for different counts.
    """
    words, types = text.upper().split(), slots.split()
    if len(words) != len(types):
        raise RetortError(f"{text!r} has {len(words)} words and {len(types)} slots ({slots!r}); expected one a word")
    symbols: list[str] = []
    # Words of one slot type in a row are one value: a value is compared as a whole.
    for kind, group in itertools.groupby(zip(types, words, strict=True), key=itemgetter(0)):
        spoken = " ".join("AND" if word == "&" else word for _, word in group if word not in PUNCTUATION)
        if spoken:
            symbols += [" "] if symbols else []
            symbols += spoken if kind == OUTSIDE else [BEGIN + kind, *spoken, END + kind]
    return symbols


def read_slots(symbols: Sequence[str]) -> Slots:
    """Return the slots in characters and slot tokens. A slot runs from its begin to the next end of its type.

    As in the reference, a begin without an end, or without a character between, is not a slot, and tokens of other
    slots inside are dropped.
    """
    slots, read = [], 0
    for place, symbol in enumerate(symbols):
        kind = symbol.removeprefix(BEGIN)  # the symbol itself if it begins no slot
        if place < read or kind == symbol or END + kind not in symbols[place:]:
            continue
        read = symbols.index(END + kind, place)
        inside = "".join(one for one in symbols[place:read] if not one.startswith((BEGIN, END)))
        if value := " ".join(inside.split()):
            slots.append((kind, value))
    return slots


class SlotFilling(RecurrentTranscription):
    """Transcription into characters and slot tokens, measured by slot-type F1 and slot-value CER."""

    labels = ("text", "slots")
    metric = "f1"
    higher_is_better = True

    @staticmethod
    def symbols(*labels: str) -> list[str]:
        return encode(*labels)

    @staticmethod
    def written(symbols: Sequence[str]) -> str:
        return "".join(f"[{one}]" if one.startswith((BEGIN, END)) else one for one in symbols)

    @staticmethod
    def rates(hypotheses: Texts, references: Texts) -> Metrics:
        found, wanted = (list(map(read_slots, texts)) for texts in (hypotheses, references))
        return {"f1": slot_type_f1(found, wanted), "cer": slot_value_cer(found, wanted)}


def score(features: Features, recipe: SfRecipe, session: TaskSession) -> SweepResult:
    """Train and measure the heads. Raises RetortError for a split without slots."""
    problem = SlotFilling(features, recipe)
    for split, transcripts in problem.splits.items():
        if not any(map(read_slots, transcripts.references.values())):
            raise RetortError(f"corpus {features.corpus.name}: no utterance of split {split!r} has a slot")
    return transcribe(problem, features, recipe, session)


SF = Task(
    name="sf",
    title="slot filling",
    metric="f1",
    higher_is_better=True,
    labels=SlotFilling.labels,
    reads="frames",
    unit_s=4.9e-3,
    recipe=SfRecipe,
    score=score,
    on_gpu=SlotFilling,
    deviations=(WITHOUT_WARPING,),
)
