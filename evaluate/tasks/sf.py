"""Slot filling: characters with a token where a slot begins and one where it ends, by CTC.

    python -m evaluate run --task sf --upstream NAME --manifest M.json --corpus C.json --out scores/NAME/sf.json

PLAY BLUE SKIES, whose slots are O track track, is said as P L A Y _ B-track B L U E _ S K I E S E-track.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from evaluate.checkpoint import Progress
from evaluate.features import Source
from evaluate.metrics import Slots, slot_type_f1, slot_value_cer
from evaluate.recurrent import DEVIATIONS, RecurrentRecipe, recurrent_problem
from evaluate.sweep import SweepResult, sweep
from evaluate.task import Task
from extract.base.errors import RetortError

BEGIN, END = "B-", "E-"
OUTSIDE = "O"
PUNCTUATION = frozenset("?!.,;-")  # as words of their own in the published transcripts
LABELS = ("text", "slots")


@dataclass(frozen=True, kw_only=True)
class SfRecipe(RecurrentRecipe):
    time_mask_ratio: float = 0.04


def encode(text: str, slots: str) -> list[str]:
    """Words and the slot type of each (or O) -> characters and slot tokens. Neighbours of one type are one slot.

    Punctuation that stands alone is dropped and & is AND, as in the reference. Raises RetortError on differing counts.
    """
    words, types = text.upper().split(), slots.split()
    if len(words) != len(types):
        raise RetortError(f"{text!r} has {len(words)} words and {len(types)} slots ({slots!r}); expected one a word")
    symbols: list[str] = []
    for kind, group in itertools.groupby(zip(types, words, strict=True), key=itemgetter(0)):
        spoken = " ".join("AND" if word == "&" else word for _, word in group if word not in PUNCTUATION)
        if spoken:
            symbols += [" "] if symbols else []
            symbols += spoken if kind == OUTSIDE else [BEGIN + kind, *spoken, END + kind]
    return symbols


def read_slots(symbols: Sequence[str]) -> Slots:
    """Characters and slot tokens -> the slots. A slot runs from its begin to the next end of its type.

    What has no end or no character is no slot; tokens of other slots within are dropped. As in the reference.
    """
    slots, read = [], 0
    for place, symbol in enumerate(symbols):
        kind = symbol.removeprefix(BEGIN)
        if place < read or kind == symbol or END + kind not in symbols[place:]:
            continue
        read = symbols.index(END + kind, place)
        said = "".join(inside for inside in symbols[place:read] if not inside.startswith((BEGIN, END)))
        if value := " ".join(said.split()):
            slots.append((kind, value))
    return slots


def rates(hypotheses: list[Sequence[str]], references: list[Sequence[str]]) -> dict[str, float]:
    said, meant = (list(map(read_slots, symbols)) for symbols in (hypotheses, references))
    return {"f1": slot_type_f1(said, meant), "cer": slot_value_cer(said, meant)}


def score(source: Source, recipe: SfRecipe, progress: Progress) -> SweepResult:
    problem = recurrent_problem(
        source, recipe, labels=LABELS, symbols=encode, metric="f1", rates=rates, higher_is_better=True
    )
    for split, transcripts in problem.splits.items():
        if not any(map(read_slots, transcripts.references.values())):
            raise RetortError(f"corpus {source.corpus.name}: no utterance of split {split!r} has a slot")
    return sweep(problem, recipe, progress)


SF = Task(
    name="sf",
    title="slot filling",
    metric="f1",
    higher_is_better=True,
    labels=LABELS,
    reads="frames",
    recipe=SfRecipe,
    score=score,
    deviations=DEVIATIONS,
)
