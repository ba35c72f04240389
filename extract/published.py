"""Published sizes, for a plan before data and weights are there: `extract plan --like base --hours 960`.

The dimensions are those of every Base and Large model of the wav2vec 2.0 family. The lengths are simulated: a mixture
like LibriSpeech's, whose mean is 12.3 s.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from extract.corpus import SAMPLE_RATE_HZ
from extract.upstream.spec import UpstreamSpec

SHAPES = {
    "base": UpstreamSpec(num_layers=13, dim=768, hop_samples=320, receptive_samples=400, stem_dim=512),
    "large": UpstreamSpec(num_layers=25, dim=1024, hop_samples=320, receptive_samples=400, stem_dim=512),
}
_UTTERANCES_AN_HOUR = 281_241 / 960  # of LibriSpeech's training set
_SHORTEST_S, _LONGEST_S = 1.4, 24.5


@dataclass(frozen=True, eq=False)
class SimulatedCorpus:
    """Utterances of noise whose lengths are simulated; no file holds them."""

    name: str
    num_samples: NDArray[np.int64]

    @classmethod
    def of(cls, hours: float) -> "SimulatedCorpus":
        """Simulate so many hours of utterances like LibriSpeech's, always the same.

        Of 100 utterances 68 last about 14.6 s (normal, standard deviation 1.0), 29 from 1.4 to 13.5 s and 3 from 16 to
        24.5 s (uniform); all are scaled to the sum and cut to 1.4 to 24.5 s.
        """
        generator = np.random.default_rng(0)
        count = max(1, round(hours * _UTTERANCES_AN_HOUR))
        kind = generator.choice(3, size=count, p=[0.68, 0.29, 0.03])
        parts = [generator.normal(14.6, 1.0, count), generator.uniform(_SHORTEST_S, 13.5, count)]
        seconds = np.choose(kind, [*parts, generator.uniform(16, _LONGEST_S, count)])
        for _ in range(5):  # cutting changes the sum a little
            seconds = np.clip(seconds * (hours * 3600 / seconds.sum()), _SHORTEST_S, _LONGEST_S)
        name = f"{hours:g} h of simulated lengths like LibriSpeech's"
        return cls(name, (seconds * SAMPLE_RATE_HZ).astype(np.int64))

    def __len__(self) -> int:
        return len(self.num_samples)

    @property
    def ids(self) -> range:
        """Numbers of the utterances, for error lines."""
        return range(len(self))

    def waveform(self, index: int) -> NDArray[np.float32]:
        """Return noise, float32 (samples,): the time of a forward pass does not depend on the content."""
        noise: NDArray[np.float32] = np.random.default_rng(index).standard_normal(
            self.num_samples[index], dtype=np.float32
        )
        return noise
