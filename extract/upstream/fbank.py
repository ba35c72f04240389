"""Filter banks as an upstream, the baseline of SUPERB. The only upstream that needs torchaudio."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.audio import deltas, log_mel
from extract.corpus import SAMPLE_RATE_HZ
from extract.upstream.spec import FBANK_SPEC, PackStates, Upstream, UpstreamFacts

_NUM_BANDS = 80
_CONVENTION = "layer 0 is log Mel with two deltas, layer 1 the same with mean and variance normalised per utterance"


class Fbank(Upstream):
    """80 log Mel energies, 25 ms every 10 ms, with deltas of first and second order, as SUPERB has them.

    SUPERB normalises mean and variance per utterance, which removes the time mean that KS and SID read. Both forms are
    therefore layers, and the layer weights of a head choose between them.
    """

    spec = FBANK_SPEC
    facts = UpstreamFacts(convention=_CONVENTION, attention="none", num_parameters=0)

    def states(
        self, prepared: Any, layers: Sequence[int], *, stem: bool = False, num_rows: int | None = None
    ) -> PackStates:
        assert not stem
        return PackStates.joined([self._layers(waveform)[list(layers)] for waveform in prepared], num_rows=num_rows)

    def _layers(self, waveform: NDArray[np.float32]) -> Tensor:
        """Return layer 0 and layer 1, float32 (2, T, 240)."""
        log_mel_TB = log_mel(torch.from_numpy(waveform), num_bands=_NUM_BANDS, sample_rate_hz=SAMPLE_RATE_HZ)
        delta_TB = deltas(log_mel_TB)
        raw_TD = torch.cat([log_mel_TB, delta_TB, deltas(delta_TB)], dim=1)
        std_D = raw_TD.std(dim=0, unbiased=False)
        normalised_TD = (raw_TD - raw_TD.mean(dim=0)) / (std_D + 1e-10)  # constant features become 0
        return torch.stack([raw_TD, normalised_TD])
