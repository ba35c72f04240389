"""Sentences of a random grammar over a closed vocabulary, and the parts of them that each corpus may use.

The vocabulary is closed (some 250 words), so that a CTC head learns ASR in about a minute on a CPU; the word error
rates are lower than those of open speech. The hash of a sentence decides which corpus may use it, so the sentences of
the teacher, of the distillation corpus and of train, dev and test of the scored corpora are disjoint for all sizes and
seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


DETERMINERS = _words("the a every that this my your our her his some another")
ADJECTIVES = _words("""
    old young little big quiet loud bright dark warm cold heavy light gentle angry hungry thirsty clever lazy brave
    shy golden silver purple yellow orange broken wooden empty narrow wide ancient modern strange careful polite
    busy
""")
NOUNS = _words("""
    farmer teacher doctor baker sailor painter judge neighbour child singer driver lawyer soldier gardener butcher
    pilot uncle cousin mother brother captain student nurse fisherman fox horse chicken donkey mouse rabbit turtle
    eagle spider goose lamb pigeon monkey dolphin bear wolf garden kitchen church bridge river mountain valley
    village island window table ladder basket bottle letter picture mirror candle button blanket hammer engine
    bicycle wagon theatre castle harbour forest meadow orchard station market museum
""")
VERBS = _words("""
    watched followed carried found painted sold borrowed remembered visited described touched measured pushed pulled
    washed repaired admired chased called heard noticed reached forgot bought stole held joined praised thanked fed
    covered moved opened closed guarded imagined
""")
INTRANSITIVE = _words("""
    slept laughed waited vanished whistled danced shouted arrived returned listened worried stumbled
""")
PREPOSITIONS = _words("near behind under above beside beyond across through without against around inside toward past")
ADVERBS = _words("""
    slowly quickly quietly carefully suddenly often always never again together yesterday today tomorrow finally
    usually gladly there
""")
NUMBERS = _words("two three four five six seven eight nine ten eleven twelve thirty forty fifty")
PLURALS = _words("""
    apples oranges pears potatoes coins stories questions boxes shoes jackets feathers flowers stones pennies
    cherries cabbages dishes pieces measures pages
""")
LINKS = _words("and but while because before after until although")
OPENERS = _words("maybe perhaps once soon later meanwhile")

VOCABULARY = sorted({
    *DETERMINERS, *ADJECTIVES, *NOUNS, *VERBS, *INTRANSITIVE, *PREPOSITIONS, *ADVERBS, *NUMBERS, *PLURALS, *LINKS,
    *OPENERS,
})  # fmt: skip

# part -> the sixteenths of all sentences that it may use, by the first byte of their hash
PARTS = {
    "teacher": range(6),  # the training of the teacher itself
    "distill": range(6, 9),  # the corpus that students are distilled on
    "train": range(9, 13),
    "dev": range(13, 14),
    "test": range(14, 15),
    "speaker": range(15, 16),  # corpora whose task does not depend on the words
}


def part_of(sentence: str) -> str:
    """Return the only part that may use `sentence` (lower case words)."""
    sixteenth = hashlib.sha256(sentence.encode()).digest()[0] % 16
    return next(part for part, sixteenths in PARTS.items() if sixteenth in sixteenths)


def sentences(part: str, generator: np.random.Generator) -> Iterator[str]:
    """Yield sentences of `part` without end, none twice."""
    used: set[str] = set()
    while True:
        sentence = _sentence(generator)
        if part_of(sentence) == part and sentence not in used:
            used.add(sentence)
            yield sentence


def _sentence(generator: np.random.Generator) -> str:
    # 15% begin with an opener, 30% have a second clause.
    words = [_choose(OPENERS, generator)] if generator.random() < 0.15 else []
    words += _clause(generator)
    if generator.random() < 0.3:
        words += [_choose(LINKS, generator), *_clause(generator)]
    return " ".join(words)


def _clause(generator: np.random.Generator) -> list[str]:
    words = _noun_phrase(generator)
    if generator.random() < 0.3:
        words.append(_choose(INTRANSITIVE, generator))
    else:
        words += [_choose(VERBS, generator), *_object(generator)]
    if generator.random() < 0.35:
        words += [_choose(PREPOSITIONS, generator), *_noun_phrase(generator)]
    elif generator.random() < 0.4:
        words.append(_choose(ADVERBS, generator))
    return words


def _object(generator: np.random.Generator) -> list[str]:
    if generator.random() < 0.35:
        return [_choose(NUMBERS, generator), _choose(PLURALS, generator)]
    return _noun_phrase(generator)


def _noun_phrase(generator: np.random.Generator) -> list[str]:
    adjective = [_choose(ADJECTIVES, generator)] if generator.random() < 0.45 else []
    return [_choose(DETERMINERS, generator), *adjective, _choose(NOUNS, generator)]


def _choose(words: list[str], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
