"""Cut silence as SUPERB's speaker verification does: sox's effect `silence 1 0.1 0.1% -1 0.1 0.1%`."""

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 0.02
THRESHOLD = 0.001  # RMS against full scale
DURATION_S = 0.1


def without_silence(audio_T: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """float32 (n,) -> (m,): nothing before the first 0.1 s of sound, and no later silence of 0.1 s and more.

    Sound is where the RMS of the last 20 ms is above 0.1% of full scale. After a cut, sound has to last 0.1 s to count.
    sox is no dependency of ours: this follows its manual, and may differ from it by some samples at every cut.
    """
    if not len(audio_T):
        return audio_T
    window, shortest = round(WINDOW_S * rate_hz), round(DURATION_S * rate_hz)
    energy_T = np.cumsum(np.square(audio_T, dtype=np.float64))
    last_T = energy_T - np.concatenate([np.zeros(min(window, len(energy_T))), energy_T[:-window]])
    loud_T = last_T > window * THRESHOLD**2
    edges = np.flatnonzero(np.diff(loud_T)) + 1
    kept = []
    inside = False  # whether sound is under way; before it, and after a cut, only long enough sound begins it
    for start, end in zip([0, *edges], [*edges, len(loud_T)], strict=True):
        long = end - start >= shortest
        if long:
            inside = bool(loud_T[start])
        if inside:
            kept.append(audio_T[start:end])
    return np.concatenate(kept) if kept else audio_T[:0]
