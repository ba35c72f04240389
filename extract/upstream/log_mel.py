"""Log Mel input of w2v-BERT 2.0 and Whisper, computed in torch on the device of the model, batch by batch.

The values are those of the feature extractors of transformers, with their own filters, to 1e-4. The extractors run on
the CPU at 35 to 3,000 times the speed of the audio on one thread, by the length of the utterance, which would hold back
a GPU.

Shapes: B batch, S samples, T Mel frames, K samples or bins of the Fourier transform, M Mel bins, F frames, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.corpus import SAMPLE_RATE_HZ
from extract.upstream.mel import HOP_SAMPLES, MEL_HOP_SAMPLES, MEL_WINDOW_SAMPLES, MelInput


class MelModel(nn.Module):
    """A model behind its Mel front end. Takes waveforms and a mask, as models of the wav2vec 2.0 family do."""

    def __init__(self, model: Any, mel: MelInput) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.log_mel: nn.Module = (
            WhisperLogMel(mel.num_bins, mel.window_s) if mel.window_s is not None else KaldiLogMel(mel.num_bins)
        )
        self._receptive_samples = mel.receptive_samples

    def forward(self, waveforms_BS: Tensor, attention_mask: Tensor, output_hidden_states: bool = True) -> Any:
        """Return the model's output for waveforms, without the frames behind the longest one."""
        num_samples = waveforms_BS.shape[1]
        # The front end is never in 16 bits: logarithms of small values would lose their digits.
        with torch.autocast(waveforms_BS.device.type, enabled=False):
            inputs = self.log_mel(waveforms_BS, attention_mask.sum(1))
        output = self.model(**inputs, output_hidden_states=output_hidden_states)
        num_frames = (num_samples - self._receptive_samples) // HOP_SAMPLES + 1
        output.last_hidden_state = output.last_hidden_state[:, :num_frames]
        output.hidden_states = tuple(state_BFD[:, :num_frames] for state_BFD in output.hidden_states)
        return output


class KaldiLogMel(nn.Module):
    """Input of w2v-BERT 2.0: Kaldi's filter bank, each bin with zero mean and unit variance, two Mel frames a row.

    As `SeamlessM4TFeatureExtractor` makes it, in float64 as there: in float32 the error of the Fourier transform would
    exceed the small powers of a frame with a strong tone.
    """

    window_K: Tensor
    filters_KM: Tensor

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        from transformers import SeamlessM4TFeatureExtractor  # imported late: it takes seconds

        own = SeamlessM4TFeatureExtractor(num_mel_bins=num_bins)  # type: ignore[no-untyped-call]
        self.register_buffer("window_K", torch.as_tensor(own.window, dtype=torch.float64))
        self.register_buffer("filters_KM", torch.as_tensor(own.mel_filters, dtype=torch.float64))

    def forward(self, waveforms_BS: Tensor, num_samples_B: Tensor) -> dict[str, Tensor]:
        """Return `input_features` (B, F, 2 M), zero on padding, and `attention_mask` (B, F)."""
        log_mel_BTM = self._log_mel(waveforms_BS.double() * 2**15)  # Kaldi's range of 16-bit samples
        num_rows, num_mel, num_bins = log_mel_BTM.shape
        num_B11 = ((num_samples_B - MEL_WINDOW_SAMPLES) // MEL_HOP_SAMPLES + 1)[:, None, None]
        own_BT1 = torch.arange(num_mel, device=waveforms_BS.device)[:, None] < num_B11
        mean_B1M = log_mel_BTM.mul(own_BT1).sum(1, keepdim=True) / num_B11
        centred_BTM = (log_mel_BTM - mean_B1M) * own_BT1
        variance_B1M = centred_BTM.square().sum(1, keepdim=True) / (num_B11 - 1)
        values_BTM = (centred_BTM / torch.sqrt(variance_B1M + 1e-7)).float()
        num_frames = num_mel // 2
        places_F = torch.arange(num_frames, device=waveforms_BS.device)
        return {
            "input_features": values_BTM[:, : 2 * num_frames].reshape(num_rows, num_frames, 2 * num_bins),
            "attention_mask": (places_F < num_B11[:, 0] // 2).long(),
        }

    def _log_mel(self, waveforms_BS: Tensor) -> Tensor:
        frames_BTK = waveforms_BS.unfold(1, MEL_WINDOW_SAMPLES, MEL_HOP_SAMPLES)
        frames_BTK = frames_BTK - frames_BTK.mean(-1, keepdim=True)
        before_BTK = F.pad(frames_BTK[..., :-1], (1, 0))
        before_BTK[..., 0] = frames_BTK[..., 0]  # Kaldi repeats the first sample
        spectrum_BTK = torch.fft.rfft((frames_BTK - 0.97 * before_BTK) * self.window_K, n=512)
        # To float32 and back at the two places where the extractor rounds too.
        power_BTK = torch.view_as_real(spectrum_BTK).float().double().square().sum(-1)
        log_mel_BTM = (power_BTK @ self.filters_KM).clamp_min(torch.finfo(torch.float32).eps).log()
        return log_mel_BTM.float().double()


class WhisperLogMel(nn.Module):
    """Input of Whisper: log Mel of the whole window, of which silence fills what is behind the utterance.

    As `WhisperFeatureExtractor` makes it: no value is more than 8 decades below the largest one of the window.
    """

    window_K: Tensor
    filters_MK: Tensor

    def __init__(self, num_bins: int, window_s: int) -> None:
        super().__init__()
        from transformers import WhisperFeatureExtractor  # imported late: it takes seconds

        own = WhisperFeatureExtractor(feature_size=num_bins)  # type: ignore[no-untyped-call]
        self._window_samples = window_s * SAMPLE_RATE_HZ
        self.register_buffer("window_K", torch.hann_window(MEL_WINDOW_SAMPLES))
        # In float64: a product of float32 matrices is in TF32 if the run is.
        self.register_buffer("filters_MK", torch.as_tensor(own.mel_filters.T.copy(), dtype=torch.float64))

    def forward(self, waveforms_BS: Tensor, num_samples_B: Tensor) -> dict[str, Tensor]:
        """Return `input_features` (B, M, T). `num_samples_B` has no effect: padding is 0, as the silence is."""
        padded_BS = F.pad(waveforms_BS, (0, self._window_samples - waveforms_BS.shape[1]))
        spectrum_BKT = torch.stft(
            padded_BS, MEL_WINDOW_SAMPLES, MEL_HOP_SAMPLES, window=self.window_K, return_complex=True
        )
        power_BKT = spectrum_BKT[..., :-1].abs().square()
        log_mel_BMT = (self.filters_MK @ power_BKT.double()).float().clamp_min(1e-10).log10()
        floor_B11 = log_mel_BMT.amax((1, 2), keepdim=True) - 8.0
        return {"input_features": (torch.maximum(log_mel_BMT, floor_B11) + 4.0) / 4.0}
