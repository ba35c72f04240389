"""ARPAbet pronunciations of the demo's words, from espeak-ng's own phones of each word said alone.

The result has the form of the published librispeech-lexicon.txt: 39 phones, a stress digit on every vowel.
"""

from __future__ import annotations

from extract.base.errors import RetortError

# espeak-ng's en-us phones (phsource/ph_english_us) -> ARPAbet; a vowel's digit is put on afterwards.
# Reduced vowels have no stress whatever the mark says.
VOWELS = {
    "a": "AE", "aa": "AE", "A:": "AA", "0": "AA", "O:": "AO", "O": "AO", "O2": "AO", "V": "AH", "E": "EH", "I": "IH",
    "i": "IY", "i:": "IY", "U": "UH", "u:": "UW", "u": "UW", "3:": "ER", "eI": "EY", "aI": "AY", "OI": "OY", "aU": "AW",
    "oU": "OW", "A@": "AA R", "O@": "AO R", "o@": "AO R", "e@": "EH R", "U@": "UH R", "i@3": "IH R", "i@": "IY AH",
    "aI@": "AY AH", "aI3": "AY ER", "aU@": "AW ER",
}  # fmt: skip
REDUCED = {
    "@": "AH",
    "@2": "AH",
    "@5": "AH",
    "a#": "AH",
    "I#": "IH",
    "I2": "IH",
    "3": "ER",
    "@L": "AH L",
    "n-": "AH N",
}
CONSONANTS = {
    "p": "P", "b": "B", "t": "T", "t#": "T", "t2": "T", "?": "T", "d": "D", "k": "K", "g": "G", "f": "F", "v": "V",
    "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH", "h": "HH", "m": "M", "n": "N", "N": "NG", "l": "L",
    "r": "R", "r-": "R", "w": "W", "w#": "W", "j": "Y", "tS": "CH", "dZ": "JH",
}  # fmt: skip
VOWEL_PHONES = frozenset(" ".join([*VOWELS.values(), *REDUCED.values()]).split()) - {"R", "L", "N"}
SAID_IN_SENTENCES = {"a": "AH0"}  # espeak names the letter when the word stands alone


def arpabet(word: str, phones: list[str]) -> str:
    """The pronunciation of `word` from its espeak phones, e.g. ["t", "'i:", "tS", "3"] -> "T IY1 CH ER0"."""
    if word in SAID_IN_SENTENCES:
        return SAID_IN_SENTENCES[word]
    has_primary = any(phone.startswith("'") for phone in phones)
    spelled: list[str] = []
    for phone in phones:
        name = phone.lstrip("',")
        stress = "1" if phone.startswith("'") else "0"
        if phone.startswith(","):
            stress = "2" if has_primary else "1"
        for arpa in _spell(word, name).split():
            if arpa in VOWEL_PHONES:
                spelled.append(arpa + ("0" if name in REDUCED else stress))
                stress = "0"  # of a diphthong and what follows it, the first vowel is the stressed one
            elif not (arpa == "R" and spelled and spelled[-1] == "R"):
                spelled.append(arpa)
    return " ".join(spelled)


def _spell(word: str, name: str) -> str:
    for table in (VOWELS, REDUCED, CONSONANTS):
        if name in table:
            return table[name]
    raise RetortError(f"lexicon: espeak says {name!r} in {word!r}; add that phone to pipelines/demo/lexicon.py")


def lexicon_text(pronunciations: dict[str, str]) -> str:
    """The file: one word a line, upper case, a tab, its phones."""
    return "".join(f"{word.upper()}\t{phones}\n" for word, phones in sorted(pronunciations.items()))
