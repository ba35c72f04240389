"""ARPAbet pronunciations of the demo's words, from espeak-ng's phones of each word in isolation.

The result has the form of the published librispeech-lexicon.txt: 39 phones, a stress digit on every vowel.
"""

from __future__ import annotations

from extract.base.errors import RetortError

# espeak-ng's en-us phones (phsource/ph_english_us) -> ARPAbet; the stress digit of a vowel is appended afterwards.
VOWELS = {
    "a": "AE", "aa": "AE", "A:": "AA", "0": "AA", "O:": "AO", "O": "AO", "O2": "AO", "V": "AH", "E": "EH", "I": "IH",
    "i": "IY", "i:": "IY", "U": "UH", "u:": "UW", "u": "UW", "3:": "ER", "eI": "EY", "aI": "AY", "OI": "OY", "aU": "AW",
    "oU": "OW", "A@": "AA R", "O@": "AO R", "o@": "AO R", "e@": "EH R", "U@": "UH R", "i@3": "IH R", "i@": "IY AH",
    "aI@": "AY AH", "aI3": "AY ER", "aU@": "AW ER",
}  # fmt: skip
# Reduced vowels are unstressed whatever espeak-ng's stress mark.
REDUCED = {
    "@": "AH", "@2": "AH", "@5": "AH", "a#": "AH", "I#": "IH", "I2": "IH", "3": "ER", "@L": "AH L", "n-": "AH N",
}  # fmt: skip
CONSONANTS = {
    "p": "P", "b": "B", "t": "T", "t#": "T", "t2": "T", "?": "T", "d": "D", "k": "K", "g": "G", "f": "F", "v": "V",
    "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH", "h": "HH", "m": "M", "n": "N", "N": "NG", "l": "L",
    "r": "R", "r-": "R", "w": "W", "w#": "W", "j": "Y", "tS": "CH", "dZ": "JH",
}  # fmt: skip
ARPABET_OF = CONSONANTS | REDUCED | VOWELS
VOWEL_PHONES = frozenset(" ".join([*VOWELS.values(), *REDUCED.values()]).split()) - {"R", "L", "N"}
IN_SENTENCES = {"a": "AH0"}  # espeak-ng spells the letter when the word is isolated


def arpabet(word: str, phones: list[str]) -> str:
    """Return the pronunciation of `word` from its espeak-ng phones: ["t", "'i:", "tS", "3"] -> "T IY1 CH ER0".

    Raises RetortError for a phone that is not in the tables above.
    """
    if word in IN_SENTENCES:
        return IN_SENTENCES[word]
    has_primary = any(phone.startswith("'") for phone in phones)
    spelled: list[str] = []
    for phone in phones:
        name = phone.lstrip("',")
        if name not in ARPABET_OF:
            raise RetortError(
                f"lexicon: espeak-ng phone {name!r} of word {word!r} has no ARPAbet phone; "
                "add it to pipelines/demo/lexicon.py"
            )
        stress = "1" if phone.startswith("'") else "0"
        if phone.startswith(","):  # secondary stress, which is the primary one of a word that has no other
            stress = "2" if has_primary else "1"
        for arpa in ARPABET_OF[name].split():
            if arpa in VOWEL_PHONES:
                spelled.append(arpa + ("0" if name in REDUCED else stress))
                stress = "0"  # only the first vowel of a phone such as "aI@" carries the stress
            elif not (arpa == "R" and spelled and spelled[-1] == "R"):  # "A@" and "r" would give R twice
                spelled.append(arpa)
    return " ".join(spelled)


def lexicon_text(pronunciations: dict[str, str]) -> str:
    """Return the text of the file: one word a line, upper case, a tab, its phones."""
    return "".join(f"{word.upper()}\t{phones}\n" for word, phones in sorted(pronunciations.items()))
