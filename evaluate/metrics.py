"""Metrics as SUPERB has them, all in percent: accuracy, and error rates over the whole corpus.

An error rate is the sum of edits over the sum of reference lengths, never a mean of rates per utterance. So an empty
hypothesis costs its whole reference, and every token said against an empty reference counts as an insertion.

Each is `Measured`: a number that knows its utterances, for the interval beside a test score.
"""

from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Levenshtein

from evaluate.interval import Measured, rate


def accuracy(predicted: Sequence[int], actual: Sequence[int]) -> Measured:
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
