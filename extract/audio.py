"""Signal processing by torchaudio: resampling, Kaldi filter banks, deltas, Mel spectrograms.

Only this file imports torchaudio. Its compiled library is linked to one build of torch: a torchaudio of another release
or another CUDA version does not load. The lock files under requirements/ hold a tested pair.
"""

import math
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.base.errors import RetortError

try:
    from torchaudio import functional, transforms
    from torchaudio.compliance import kaldi
except (ImportError, OSError, RuntimeError, AttributeError) as error:  # undefined symbols, CUDA versions, not installed
    raise RetortError(
        f"torchaudio does not load beside torch {version('torch')} ({' '.join(str(error).split())[:200]}); "
        "install the tested pair: pip install -r requirements/run.lock"
    ) from None


_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99  # defaults of torchaudio.functional.resample
_LARGEST_KERNEL = 1 << 21  # values, 8 MB; 44,100 Hz to 16 kHz needs 76,000, 44,099 Hz 700 million
_PHASES_AT_ONCE = 4096  # bounds the memory of the kernels


def resample(audio_T: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample float32 (samples,) by windowed sinc interpolation, to ceil(samples * to_hz / from_hz) samples.

    The filter is torchaudio's default. torchaudio stores a kernel of from_hz / gcd values for each of to_hz / gcd
    phases. If that is large (rates with a small common divisor), only the non-zero values of the same filter are
    applied, so that for every pair of rates the cost is proportional to the length of the audio.
    """
    divisor = math.gcd(from_hz, to_hz)
    before, after = from_hz // divisor, to_hz // divisor
    if before * after > _LARGEST_KERNEL:
        return _resample_by_taps(audio_T, before, after)
    resampled: NDArray[np.float32] = functional.resample(torch.from_numpy(audio_T), from_hz, to_hz).numpy()
    return resampled


def _resample_by_taps(audio_T: NDArray[np.float32], before: int, after: int) -> NDArray[np.float32]:
    """Resample by the ratio after / before, which has no common divisor: float32 (T,) -> (ceil(T * after / before),).

    Shapes: P periods of `after` output and `before` input samples, N phases (output samples of a period), K weights of
    a phase. The weights are those of torchaudio.functional.resample: a sinc under a Hann window of 6 zero crossings.
    """
    num_out = -(-len(audio_T) * after // before)
    cutoff = min(before, after) * _ROLLOFF  # below the lower Nyquist rate, against aliases
    width = math.ceil(_ZERO_CROSSINGS * before / cutoff)  # input samples on each side of the centre of the filter
    num_periods = -(-num_out // after)
    padded_T = np.zeros((num_periods + 1) * before + 2 * width + 2, np.float32)
    padded_T[width : width + len(audio_T)] = audio_T
    out_PN = np.zeros((num_periods, after), np.float32)
    for first in range(0, min(after, num_out), _PHASES_AT_ONCE):
        phase_N = np.arange(first, min(first + _PHASES_AT_ONCE, after, num_out))
        nearest_N = phase_N * before // after  # input sample before the output sample
        offset_NK = np.arange(-width, width + 2) + (nearest_N - phase_N * before / after)[:, None]  # input samples
        t_NK = np.clip(offset_NK * (cutoff / before), -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
        window_NK = np.cos(t_NK * (np.pi / _ZERO_CROSSINGS / 2)) ** 2
        weight_NK = (np.sinc(t_NK) * window_NK * (cutoff / before)).astype(np.float32)
        tap_NK = nearest_N[:, None] + np.arange(2 * width + 2)
        for period in range(num_periods):
            taps_NK = padded_T[period * before :][tap_NK]
            out_PN[period, phase_N] = np.einsum("nk,nk->n", taps_NK, weight_NK)
    return out_PN.reshape(-1)[:num_out]


def log_mel(waveform_T: Tensor, *, num_bands: int, sample_rate_hz: int = 16_000) -> Tensor:
    """Return Kaldi's log Mel filter bank of float32 (samples,), 25 ms every 10 ms: float32 (frames, num_bands)."""
    features: Tensor = kaldi.fbank(waveform_T[None], num_mel_bins=num_bands, sample_frequency=sample_rate_hz)
    return features


def deltas(features_TD: Tensor, *, window: int = 5) -> Tensor:
    """Return regression coefficients over `window` frames, of the same shape as the features (frames, dim)."""
    found: Tensor = functional.compute_deltas(features_TD.T, win_length=window).T
    return found


def mel_spectrogram(*, num_bands: int, sample_rate_hz: int, window_samples: int, hop_samples: int) -> torch.nn.Module:
    """Return a module for power Mel spectrograms without padding: (batch, samples) -> (batch, num_bands, frames)."""
    module: torch.nn.Module = transforms.MelSpectrogram(
        sample_rate_hz, n_fft=window_samples, hop_length=hop_samples, n_mels=num_bands, center=False
    )
    return module
