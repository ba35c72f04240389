"""A student's ONNX file as an upstream, run by onnxruntime on the CPU.

Utterances are run one by one: in int8 the values of a batch share one scale, so that padding and other utterances would
change an utterance's features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ, normalise_waveform
from extract.onnx_file import open_session, record_of, run_session, state_name
from extract.upstream.card import UpstreamCard
from extract.upstream.forward import CONVENTION
from extract.upstream.spec import PackStates, Upstream, UpstreamFacts, onnx_spec


class OnnxStudent(Upstream):
    """An exported student, with as many threads as torch has."""

    device = "cpu"
    dtype = "fp32"  # of the hidden states, whatever the weights are

    def __init__(self, card: UpstreamCard, *, dtype: str) -> None:
        assert card.folder is not None
        import onnxruntime

        if dtype != "fp32":
            raise RetortError(f"--dtype {dtype}: {card.id} is run in the precision of its export; give --dtype fp32")
        self._path, self._normalise = card.folder, card.normalise
        self._session = open_session(card.folder, threads=torch.get_num_threads())
        record = record_of(self._session, card.folder)
        self.spec = onnx_spec(record)
        self.facts = UpstreamFacts(
            convention=f"{CONVENTION}; exported to ONNX, weights of matrix products in {record.weights}",
            attention=f"onnxruntime {onnxruntime.__version__}",
            num_parameters=record.num_parameters,
            macs_per_audio_s=record.macs_per_audio_s,
        )

    def prepare(self, waveforms: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        return [normalise_waveform(waveform) if self._normalise else waveform for waveform in waveforms]

    def states(
        self, prepared: Any, layers: Sequence[int], *, stem: bool = False, num_rows: int | None = None
    ) -> PackStates:
        assert not stem
        hidden = [torch.cat(self._layers(waveform_S, layers)) for waveform_S in prepared]
        return PackStates.joined(hidden, num_rows=num_rows)

    def forward(self, waveforms: Sequence[NDArray[np.float32]]) -> list[Tensor]:
        """Return all hidden states of one waveform, each (1, T, D)."""
        (waveform_S,) = self.prepare(waveforms)
        return self._layers(waveform_S, range(self.spec.num_layers))

    def _layers(self, waveform_S: NDArray[np.float32], layers: Sequence[int]) -> list[Tensor]:
        inputs = {"input_values": waveform_S[None], "attention_mask": np.ones((1, len(waveform_S)), dtype=np.int64)}
        duration_s = len(waveform_S) / SAMPLE_RATE_HZ
        fix = f"cut the utterance of {duration_s:.1f} s with --cut-long, or export the student again"
        found = run_session(self._session, list(map(state_name, layers)), inputs, path=self._path, fix=fix)
        return [torch.from_numpy(state_1TD) for state_1TD in found]
