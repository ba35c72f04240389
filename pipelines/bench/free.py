"""An upstream of zero cost: its hidden states are slices of one array of noise. All else of stage one is real.

Shapes: L layers, T frames of an utterance, D features, C channels of the convolution stem.
"""

from collections.abc import Sequence
from typing import Any

from extract.config import ExtractConfig
from extract.shards import LocalRunner
from extract.upstream.card import UpstreamCard
from extract.upstream.spec import PackStates, Upstream, UpstreamFacts, UpstreamSpec
from pipelines.bench.synthetic import hidden_states

HOP_SAMPLES, RECEPTIVE_SAMPLES = 320, 400  # of wav2vec 2.0's stem
CARD = UpstreamCard("noise", "noise", None, "noise", "", "", False, None, None)


class FreeUpstream(Upstream):
    """`num_layers` layers of `dim` features, for utterances of at most `longest` frames."""

    def __init__(self, *, num_layers: int, dim: int, longest: int, stem_dim: int | None = None) -> None:
        self.spec = UpstreamSpec(num_layers, dim, HOP_SAMPLES, RECEPTIVE_SAMPLES, stem_dim)
        self.facts = UpstreamFacts(convention="noise", attention="none", num_parameters=0)
        self._noise_LTD = hidden_states(num_layers, longest, dim)
        self._stem_TC = hidden_states(1, longest, stem_dim or 1)[0]

    def states(
        self, prepared: Any, layers: Sequence[int], *, stem: bool = False, num_rows: int | None = None
    ) -> PackStates:
        import torch

        noise_LTD = torch.from_numpy(self._noise_LTD[layers[0] : layers[-1] + 1])
        assert len(noise_LTD) == len(layers)  # neighbouring layers need no copy
        counts = [(len(waveform) - RECEPTIVE_SAMPLES) // HOP_SAMPLES + 1 for waveform in prepared]
        stem_TC = torch.from_numpy(self._stem_TC)
        stems = [stem_TC[:count] for count in counts] if stem else None
        return PackStates.joined([noise_LTD[:, :count] for count in counts], num_rows=num_rows, stem=stems)


class FreeRunner(LocalRunner):
    """A runner with an upstream of zero cost."""

    def __init__(self, config: ExtractConfig, upstream: FreeUpstream, card: UpstreamCard = CARD) -> None:
        super().__init__(config, card)
        self.upstream = upstream
