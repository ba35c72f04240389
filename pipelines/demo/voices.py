"""The voices of the embedded demo: espeak-ng variants at seeded pitches, rates and ranges.

The variants that the teacher was taught with and those that the scored corpora use are two lists with no family of
near-copies across them (steph, steph2 and steph3 are one family), so no score hears a voice that the teacher knows.
Left out of both: whispers and croaks (no pitch), robots (one pitch, an echo), some that swallow half of the phones, and
those with breath, which espeak-ng says differently from one process to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# espeak-ng-data/voices/!v. The distillation corpus uses these too: it carries no score.
TAUGHT_VARIANTS = [
    "Alex", "Annie", "Denis", "Gene", "Hugo", "Jacky", "Mario", "Nguyen", "adam", "aunty", "belinda", "boris",
    "david", "f1", "gustave", "iven", "iven3", "klatt2", "klatt4", "linda", "m1", "m3", "m5", "m7", "marcelo",
    "mike2", "paul", "quincy", "shelby", "travis",
]  # fmt: skip
SCORED_VARIANTS = [
    "Andrea", "Andy", "Diogo", "Marco", "Mike", "announcer", "anika", "antonio", "benjamin", "ed", "edward", "f4",
    "grandma", "grandpa", "john", "m2", "m4", "m6", "m8", "max", "michel", "norbert", "pablo", "pedro", "robert",
    "steph",
]  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """One voice as espeak-ng's C API takes it.

    Arguments:
        variant: a file of espeak-ng-data/voices/!v.
        pitch: 0 to 99, 50 is the variant's own.
        rate: words a minute.
        range: 0 to 99, how far the pitch moves; 0 is monotone.
    """

    variant: str
    pitch: int = 50
    rate: int = 170
    range: int = 50

    def moved(self, generator: np.random.Generator) -> Voice:
        """The same speaker on another day: a little higher or lower, faster or slower."""
        return Voice(
            self.variant,
            pitch=int(np.clip(self.pitch + generator.integers(-6, 7), 0, 99)),
            rate=int(self.rate + generator.integers(-18, 19)),
            range=int(np.clip(self.range + generator.integers(-10, 11), 0, 99)),
        )


def draw_voices(variants: list[str], count: int, generator: np.random.Generator) -> list[Voice]:
    """`count` different voices; every variant is used once before any is used twice.

    Two voices of one variant stand at least 20 steps of pitch apart for as long as there is room for that.
    """
    voices: list[Voice] = []
    pitches_of: dict[str, list[int]] = {variant: [] for variant in variants}
    while len(voices) < count:
        for variant in generator.permutation(variants)[: count - len(voices)]:
            pitch = _pitch_apart(pitches_of[str(variant)], generator)
            pitches_of[str(variant)].append(pitch)
            voices.append(
                Voice(
                    str(variant),
                    pitch,
                    rate=int(generator.integers(130, 211)),
                    range=int(generator.integers(20, 91)),
                )
            )
    return voices


def _pitch_apart(taken: list[int], generator: np.random.Generator) -> int:
    candidates = generator.integers(10, 91, size=16)
    distances = [min((abs(int(pitch) - other) for other in taken), default=20) for pitch in candidates]
    return int(candidates[int(np.argmax(np.minimum(distances, 20)))])
