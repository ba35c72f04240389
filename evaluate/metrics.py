"""Metrics as SUPERB has them, all in percent: accuracy, and error rates over the whole corpus.

An error rate is the sum of edits over the sum of reference lengths, never a mean of rates per utterance. So an empty
hypothesis costs its whole reference, and every token said against an empty reference counts as an insertion.

Each is `Measured`: a number that knows its utterances, for the interval beside a test score.
"""

from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Levenshtein

from evaluate.bootstrap import Measured, rate

Slots = Sequence[tuple[str, str]]  # (type, value) of an utterance's slots, in order


def accuracy(predicted: Sequence[object], actual: Sequence[object]) -> Measured:
    """Percent of equal pairs. Raises ValueError on different lengths, or none."""
    if not actual:
        raise ValueError("accuracy over no examples is not defined")
    return rate([a == b for a, b in zip(predicted, actual, strict=True)])


def token_error_rate(hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> Measured:
    """Percent of token edits (substitutions, insertions, deletions) by reference token, over the corpus.

    Raises ValueError on different lengths, and where no reference has a token: the rate is not defined then.
    """
    edits_U = [Levenshtein.distance(h, r) for h, r in zip(hypotheses, references, strict=True)]
    lengths_U = [len(reference) for reference in references]
    if not sum(lengths_U):
        raise ValueError("an error rate over references without a token is not defined")
    return rate(edits_U, lengths_U)


def phone_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """PER in percent. Phones are separated by white space."""
    return token_error_rate([h.split() for h in hypotheses], [r.split() for r in references])


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """WER in percent, upper case as in the reference. Words are separated by white space."""
    return token_error_rate([h.upper().split() for h in hypotheses], [r.upper().split() for r in references])


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """CER in percent, upper case as in the reference; a space between words is a character."""
    return token_error_rate([h.upper() for h in hypotheses], [r.upper() for r in references])


def slot_type_f1(hypotheses: Sequence[Slots], references: Sequence[Slots]) -> Measured:
    """F1 in percent over the set of slot types of an utterance, then the mean over utterances.

    No slot on either side is 100, none on one of them 0. Raises ValueError on different lengths, or none.
    """
    if not references:
        raise ValueError("slot-type F1 over no utterance is not defined")
    scores_U = [
        2 * len(said & meant) / (len(said) + len(meant)) if said or meant else 1.0
        for said, meant in zip(map(_types, hypotheses), map(_types, references), strict=True)
    ]
    return rate(scores_U)


def slot_value_cer(hypotheses: Sequence[Slots], references: Sequence[Slots]) -> Measured:
    """Percent of character edits by reference character over all reference slots of the corpus.

    Each reference value is set against the hypothesis's value of its type with the lowest CER, the empty one where
    there is none of it; a hypothesis of a type that the reference lacks costs nothing here (F1 has it).
    Raises ValueError on different lengths, and where no reference has a slot.
    """
    pairs_U = list(zip(hypotheses, references, strict=True))
    edits_U = [sum(_fewest_edits(said, slot) for slot in meant) for said, meant in pairs_U]
    lengths_U = [sum(len(value) for _, value in meant) for _, meant in pairs_U]
    if not sum(lengths_U):
        raise ValueError("a slot-value CER over references without a slot is not defined")
    return rate(edits_U, lengths_U)


def _types(slots: Slots) -> set[str]:
    return {type_ for type_, _ in slots}


def _fewest_edits(said: Slots, slot: tuple[str, str]) -> int:
    """Edits between a reference slot's value and the closest that was said of its type."""
    values = [value for type_, value in said if type_ == slot[0]] or [""]
    return min(Levenshtein.distance(value, slot[1]) for value in values)
