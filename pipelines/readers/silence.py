"""Removal of silence as in SUPERB's speaker verification: sox's effect `silence 1 0.1 0.1% -1 0.1 0.1%`."""

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 0.02  # of the moving RMS
THRESHOLD = 0.001  # RMS relative to full scale
DURATION_S = 0.1  # shortest silence that is removed, and shortest sound that ends one


def without_silence(audio_T: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """Return float32 (n,) -> (m,) without the audio before the first 0.1 s of sound, and without silences of 0.1 s.

    Sound is where the RMS of the last 20 ms is above 0.1% of full scale. After a removed silence, sound has to last
    0.1 s to be kept. This follows sox's manual without using sox, and may differ from it by some samples at every cut.
    """
    if not len(audio_T):
        return audio_T
    window, shortest = round(WINDOW_S * rate_hz), round(DURATION_S * rate_hz)
    # Energy of the last `window` samples, as a difference of cumulative sums; at the start, of the samples so far.
    energy_T = np.cumsum(np.square(audio_T, dtype=np.float64))
    last_T = energy_T - np.concatenate([np.zeros(min(window, len(energy_T))), energy_T[:-window]])
    loud_T = last_T > window * THRESHOLD**2
    edges = np.flatnonzero(np.diff(loud_T)) + 1
    kept = []
    inside = False  # inside a stretch of sound, which only long sound begins and only long silence ends
    for start, end in zip([0, *edges], [*edges, len(loud_T)], strict=True):
        if end - start >= shortest:
            inside = bool(loud_T[start])
        if inside:
            kept.append(audio_T[start:end])
    return np.concatenate(kept) if kept else audio_T[:0]
