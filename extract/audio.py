"""Signal processing by torchaudio: resampling, Kaldi filter banks, deltas, Mel spectrograms.

The only file that imports torchaudio. Its compiled library is linked to one build of torch, so that a torchaudio of
another release, or of another CUDA version, does not load; the lock files under requirements/ hold a tested pair.
"""

from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.errors import RetortError

try:
    from torchaudio import functional, transforms
    from torchaudio.compliance import kaldi
except (ImportError, OSError, RuntimeError, AttributeError) as error:  # undefined symbols, CUDA versions, a missing one
    raise RetortError(
        f"torchaudio does not load beside torch {version('torch')} ({' '.join(str(error).split())[:200]}); "
        "install the tested pair: pip install -r requirements/run.lock"
    ) from None


def resample(audio_T: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample float32 (samples,) by windowed sinc interpolation (torchaudio's defaults)."""
    resampled: NDArray[np.float32] = functional.resample(torch.from_numpy(audio_T), from_hz, to_hz).numpy()
    return resampled


def log_mel(waveform_T: Tensor, *, num_bands: int, sample_rate_hz: int = 16_000) -> Tensor:
    """Kaldi's log Mel filter bank of float32 (samples,), 25 ms every 10 ms: float32 (frames, num_bands)."""
    features: Tensor = kaldi.fbank(waveform_T[None], num_mel_bins=num_bands, sample_frequency=sample_rate_hz)
    return features


def deltas(features_TD: Tensor, *, window: int = 5) -> Tensor:
    """Regression coefficients over `window` frames, the same shape as the features (frames, dim)."""
    found: Tensor = functional.compute_deltas(features_TD.T, win_length=window).T
    return found


def mel_spectrogram(*, num_bands: int, sample_rate_hz: int, window_samples: int, hop_samples: int) -> torch.nn.Module:
    """Power Mel spectrogram as a module, (batch, samples) -> (batch, num_bands, frames), without padding."""
    module: torch.nn.Module = transforms.MelSpectrogram(
        sample_rate_hz, n_fft=window_samples, hop_length=hop_samples, n_mels=num_bands, center=False
    )
    return module
