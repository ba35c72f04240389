"""Metrics as SUPERB has them, all in percent: accuracy, and error rates over the whole corpus.

An error rate is the sum of edits over the sum of reference lengths, never a mean of rates per utterance. So an empty
hypothesis costs its whole reference, and every token said against an empty reference counts as an insertion.
"""

from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Levenshtein


def accuracy(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """Percent of equal pairs. Raises ValueError on different lengths, or none."""
    if not actual:
        raise ValueError("accuracy over no examples is not defined")
    return 100 * sum(a == b for a, b in zip(predicted, actual, strict=True)) / len(actual)


def token_error_rate(hypotheses: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> float:
    """Percent of token edits (substitutions, insertions, deletions) by reference token, over the corpus.

    Raises ValueError on different lengths, and where no reference has a token: the rate is not defined then.
    """
    num_tokens = sum(len(reference) for reference in references)
    edits = sum(Levenshtein.distance(h, r) for h, r in zip(hypotheses, references, strict=True))
    if not num_tokens:
        raise ValueError("an error rate over references without a token is not defined")
    return 100 * edits / num_tokens


def phone_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """PER in percent. Phones are separated by white space."""
    return token_error_rate([h.split() for h in hypotheses], [r.split() for r in references])


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """WER in percent, upper case as in the reference. Words are separated by white space."""
    return token_error_rate([h.upper().split() for h in hypotheses], [r.upper().split() for r in references])


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """CER in percent, upper case as in the reference; a space between words is a character."""
    return token_error_rate([h.upper() for h in hypotheses], [r.upper() for r in references])
