"""Voices of the demo: espeak-ng variants at random pitches, rates and pitch ranges, drawn by seed.

The teacher's training voices and the voices of the scored corpora are two lists that share no family of near-copies
(steph, steph2 and steph3 are one family), so no score is measured on a voice of the teacher's training data. Variants
left out of both lists: whispered and creaky voices (no pitch), robots (constant pitch, echo), some that drop half of
the phones, and those with breath noise, whose samples differ from one process to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Files of espeak-ng-data/voices/!v. The distillation corpus, which has no score, uses the teacher's list too.
TEACHER_VARIANTS = [
    "Alex", "Annie", "Denis", "Gene", "Hugo", "Jacky", "Mario", "Nguyen", "adam", "aunty", "belinda", "boris",
    "david", "f1", "gustave", "iven", "iven3", "klatt2", "klatt4", "linda", "m1", "m3", "m5", "m7", "marcelo",
    "mike2", "paul", "quincy", "shelby", "travis",
]  # fmt: skip
SCORED_VARIANTS = [
    "Andrea", "Andy", "Diogo", "Marco", "Mike", "announcer", "anika", "antonio", "benjamin", "ed", "edward", "f4",
    "grandma", "grandpa", "john", "m2", "m4", "m6", "m8", "max", "michel", "norbert", "pablo", "pedro", "robert",
    "steph",
]  # fmt: skip
PITCH_STEPS_APART = 20  # between two voices of one variant, out of 100
PITCH_CANDIDATES = 16  # drawn for a voice; the one farthest from the variant's other voices is taken


@dataclass(frozen=True)
class Voice:
    """One voice, in the units of espeak-ng's C API.

    Arguments:
        variant: a file of espeak-ng-data/voices/!v.
        pitch: 0 to 99; 50 is the variant's own.
        rate: words per minute.
        range: 0 to 99, the extent of pitch movement; 0 is monotone.
    """

    variant: str
    pitch: int = 50
    rate: int = 170
    range: int = 50

    def shifted(self, pitch: float, rate: float, range: float) -> Voice:
        """Return the voice with pitch, rate and range changed by these amounts, within espeak-ng's limits."""
        return Voice(
            self.variant,
            pitch=int(np.clip(self.pitch + pitch, 0, 99)),
            rate=int(self.rate + rate),
            range=int(np.clip(self.range + range, 0, 99)),
        )

    def varied(self, generator: np.random.Generator) -> Voice:
        """Return the voice with the small random changes of one speaker between recordings."""
        pitch, rate, extent = (int(generator.integers(-most, most + 1)) for most in (6, 18, 10))
        return self.shifted(pitch, rate, extent)


def draw_voices(variants: list[str], count: int, generator: np.random.Generator) -> list[Voice]:
    """Draw `count` different voices; every variant is used once before any is used twice.

    Two voices of one variant differ by at least PITCH_STEPS_APART as long as the range of pitches allows it.
    """
    voices: list[Voice] = []
    pitches_of: dict[str, list[int]] = {variant: [] for variant in variants}
    while len(voices) < count:
        for variant in map(str, generator.permutation(variants)[: count - len(voices)]):
            pitch = _draw_pitch(pitches_of[variant], generator)
            pitches_of[variant].append(pitch)
            rate, extent = int(generator.integers(130, 211)), int(generator.integers(20, 91))
            voices.append(Voice(variant, pitch, rate=rate, range=extent))
    return voices


def more_voices(variants: list[str], count: int, more: int, seed: int) -> list[Voice]:
    """Return the voices that `draw_voices` draws after the first `count` with a new generator of this seed.

    A plan that draws other things after its voices keeps them if further speakers get their voices from here.
    """
    return draw_voices(variants, count + more, np.random.default_rng(seed))[count:]


def _draw_pitch(taken: list[int], generator: np.random.Generator) -> int:
    """Draw a pitch at a distance of at least PITCH_STEPS_APART from `taken`, or the farthest of the candidates."""
    candidates = generator.integers(10, 91, size=PITCH_CANDIDATES)
    distances = [min((abs(int(pitch) - other) for other in taken), default=PITCH_STEPS_APART) for pitch in candidates]
    return int(candidates[int(np.argmax(np.minimum(distances, PITCH_STEPS_APART)))])
