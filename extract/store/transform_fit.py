"""Fit of codec `transform` to a sample of hidden states: one layer after another, in numpy, the same on every run.

    1. KLT: eigenvectors of the covariance of the features, directions of large variance first;
    2. deviations and gains: gains follow from deviations and the reverse, so each is estimated from the other twice;
    3. bits: each goes to the coefficient whose expected squared error it lowers most, with the errors of the best
       quantisers of a normal variable (Max, 1960): reverse water-filling in whole bits;
    4. levels: one Lloyd-Max quantiser for each number of bits, of all coefficients with that many. One for each
       coefficient lost up to 2 dB on held-out utterances, as few of its values are in the sample's tails.

Shapes as in `extract.store.transform`.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.store.transform import (
    BLOCK_FRAMES,
    LEAST_GAIN,
    MOST_BITS,
    NUM_BANDS,
    NUM_GAINS,
    Transform,
    dct_matrix,
    middles,
)

SAMPLE_FRAMES = 65_536  # in all packs of the sample
_ROUNDS = 2  # of gains and deviations
_OCTAVES_ABOVE = 0.5  # of the largest gain above the loudest block of the sample
_LLOYD_ROUNDS = 50
_LLOYD_VALUES = 1 << 18
_ROWS = 4096  # frames whose float64 covariance is added at a time
_LEAST_DEVIATION = 1e-6  # of the largest value: below it a layer is constant but for rounding
# Squared errors of quantisers of 0 to 8 bits of a normal variable of variance 1; a quarter a bit beyond 5 bits.
_NORMAL_ERRORS = np.array([1, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000625, 0.000156, 0.000039])

Values = NDArray[np.float32]


def fit(codec: Transform, layers_FD: Iterable[Values]) -> dict[str, NDArray[np.generic]]:
    """Return the parameters of a codec for layers that are given one after another.

    layers_FD: float32 (F, D) each; its blocks of 16 rows lie inside utterances. Raises RetortError for values that are
    not finite and for a layer without variance, which it names by its place.
    """
    fitted = [_fit_layer(codec, hidden_FD, place) for place, hidden_FD in enumerate(layers_FD)]
    num_kept = max(one["basis"].shape[0] for one in fitted)
    whole = {name: np.stack([_widened(one[name], name, num_kept) for one in fitted]) for name in fitted[0]}
    codec.fitted(whole)  # raises for an error of this module
    return whole


def _widened(values: NDArray[np.generic], name: str, num_kept: int) -> NDArray[np.generic]:
    """Append directions without bits, so that layers with fewer directions have as many as the others."""
    if name not in ("basis", "bits", "deviation"):
        return values
    axis = 0 if name == "basis" else 1
    widths = [(0, num_kept - size if at == axis else 0) for at, size in enumerate(values.shape)]
    return np.pad(values, widths)


def _fit_layer(codec: Transform, hidden_FD: Values, place: int) -> dict[str, NDArray[np.generic]]:
    if not np.isfinite(hidden_FD).all():
        raise RetortError(f"codec {codec.name}: the sample's values of layer number {place} are not finite")
    mean_D, basis_DD = _klt(hidden_FD)
    coefficient_BTD = np.empty((len(hidden_FD) // BLOCK_FRAMES, BLOCK_FRAMES, hidden_FD.shape[1]), dtype=np.float32)
    for first in range(0, len(coefficient_BTD), _ROWS // BLOCK_FRAMES):
        blocks = slice(first, first + _ROWS // BLOCK_FRAMES)
        own_FD = hidden_FD[first * BLOCK_FRAMES : blocks.stop * BLOCK_FRAMES]
        projected_FD = (own_FD - mean_D) @ basis_DD.T
        coefficient_BTD[blocks] = dct_matrix(BLOCK_FRAMES) @ projected_FD.reshape(-1, BLOCK_FRAMES, len(mean_D))
    num_bits = codec.num_bits(len(mean_D))
    deviation_TD = _root_mean_square(coefficient_BTD)
    least = max(_LEAST_DEVIATION * float(np.abs(hidden_FD).max()), float(np.finfo(np.float32).tiny))
    if not (deviation_TD > least).any():
        raise RetortError(f"codec {codec.name}: layer number {place} has no variance; use --codec int8")
    bits_TD = _allocated(deviation_TD.astype(np.float64) ** 2, num_bits)
    for _ in range(_ROUNDS):
        gains_EG, gain_BT = _gains(coefficient_BTD, deviation_TD, bits_TD)
        deviation_TD = _root_mean_square(coefficient_BTD, gain_BT)
        power_T1 = np.square(gain_BT, dtype=np.float64).mean(0)[:, None]
        bits_TD = _allocated(power_T1 * deviation_TD.astype(np.float64) ** 2, num_bits)
    kept = np.flatnonzero(bits_TD.any(0))[-1] + 1  # directions
    _, gain_BT = _gains(coefficient_BTD, deviation_TD, bits_TD, gains_EG)
    return {
        "mean": mean_D,
        "basis": basis_DD[:kept],
        "bits": bits_TD[:, :kept],
        "deviation": np.where(bits_TD > 0, deviation_TD, np.float32(0))[:, :kept],
        "gains": gains_EG,
        "levels": _levels(coefficient_BTD, deviation_TD, gain_BT, bits_TD),
    }


def _klt(hidden_FD: Values) -> tuple[Values, Values]:
    """Return the mean (D,) and the eigenvectors of the covariance (D, D), a row each, of large variance first."""
    mean_D = hidden_FD.mean(0, dtype=np.float64)
    covariance_DD = np.zeros((len(mean_D), len(mean_D)))
    for first in range(0, len(hidden_FD), _ROWS):
        centred_FD = hidden_FD[first : first + _ROWS] - mean_D
        covariance_DD += centred_FD.T @ centred_FD
    basis_DD = np.linalg.eigh(covariance_DD)[1].T[::-1]
    # Of both signs the one whose largest entry is positive: libraries of linear algebra differ in it.
    largest_D = np.take_along_axis(basis_DD, np.abs(basis_DD).argmax(1)[:, None], 1)
    return mean_D.astype(np.float32), (basis_DD * np.sign(largest_D)).astype(np.float32)


def _root_mean_square(coefficient_BTD: Values, gain_BT: Values | None = None) -> Values:
    """Return the root mean square over blocks, float32 (T, D), of coefficients that are divided by their gains."""
    found_TD = np.empty(coefficient_BTD.shape[1:], dtype=np.float32)
    for row in range(len(found_TD)):  # one at a time: the temporary array is a T-th
        value_BD = coefficient_BTD[:, row] if gain_BT is None else coefficient_BTD[:, row] / gain_BT[:, row, None]
        found_TD[row] = np.sqrt(np.square(value_BD).mean(0, dtype=np.float64))
    return found_TD


def _allocated(variance_TD: NDArray[np.float64], num_bits: int) -> NDArray[np.uint8]:
    """Return the bits of each coefficient, uint8 (T, D), at most `num_bits` in sum."""
    # A further bit of a coefficient always gains less than the one before: the largest gains are a valid choice.
    gained = (variance_TD.reshape(-1, 1) * -np.diff(_NORMAL_ERRORS)).reshape(-1)
    chosen = np.argsort(-gained, kind="stable")[:num_bits]
    chosen = chosen[gained[chosen] > 0]
    bits = np.bincount(chosen // MOST_BITS, minlength=variance_TD.size)
    return bits.reshape(variance_TD.shape).astype(np.uint8)


def _gains(
    coefficient_BTD: Values, deviation_TD: Values, bits_TD: NDArray[np.uint8], gains_EG: Values | None = None
) -> tuple[Values, Values]:
    """Return the gains of each band, float32 (E, G), and the gain of each block and row, float32 (B, T).

    gains_EG: known gains; None: they are fitted, as a Lloyd-Max quantiser of their logarithms.
    """
    power_BE = np.zeros((len(coefficient_BTD), NUM_BANDS))
    counts_E = np.zeros(NUM_BANDS)
    for row in range(BLOCK_FRAMES):
        coded = bits_TD[row] > 0
        band = min(row, 1)
        power_BE[:, band] += np.square(coefficient_BTD[:, row, coded] / deviation_TD[row, coded]).sum(1)
        counts_E[band] += coded.sum()
    logarithm_BE = 0.5 * np.log2((power_BE / np.maximum(counts_E, 1)).clip(LEAST_GAIN**2))
    if gains_EG is None:
        levels_EG = np.stack([lloyd_max(values_B, NUM_GAINS) for values_B in logarithm_BE.T])
        # The store has louder blocks than the sample, and too small a gain costs more than too large a one.
        levels_EG[:, -1] = logarithm_BE.max(0) + _OCTAVES_ABOVE
        gains_EG = (2**levels_EG).astype(np.float32)
    edges_EG = middles(np.log2(gains_EG))
    by_band = [gains_EG[band][np.searchsorted(edges_EG[band, :-1], logarithm_BE[:, band])] for band in range(NUM_BANDS)]
    return gains_EG, np.stack([by_band[min(row, 1)] for row in range(BLOCK_FRAMES)], axis=1)


def _levels(coefficient_BTD: Values, deviation_TD: Values, gain_BT: Values, bits_TD: NDArray[np.uint8]) -> Values:
    """Return the levels of each number of bits, float32 (Q, V), zeros where no coefficient has that many."""
    levels_QV = np.zeros((MOST_BITS + 1, 1 << MOST_BITS), dtype=np.float32)
    for number in range(1, MOST_BITS + 1):
        found = []
        step = max(1, int((bits_TD == number).sum()) * len(coefficient_BTD) // _LLOYD_VALUES)  # blocks
        for row in range(BLOCK_FRAMES):
            chosen = np.flatnonzero(bits_TD[row] == number)
            first = row % step  # other blocks for other rows
            value_BC = coefficient_BTD[first::step, row][:, chosen]
            found.append((value_BC / deviation_TD[row, chosen] / gain_BT[first::step, row, None]).reshape(-1))
        if len(values := np.concatenate(found)):
            levels_QV[number, : 1 << number] = lloyd_max(values, 1 << number)
    return levels_QV


def lloyd_max(values: NDArray[np.floating], num_levels: int) -> NDArray[np.float64]:
    """Return the ascending levels, float64 (V,), of a scalar quantiser of small squared error on a sample of values.

    Lloyd's iteration from levels whose density is the cube root of that of the values.
    """
    ordered = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    counts, bounds = np.histogram(ordered, 4096)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    levels: NDArray[np.float64] = np.interp((np.arange(num_levels) + 0.5) / num_levels, share / share[-1], bounds)
    for _ in range(_LLOYD_ROUNDS):
        ends = np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(ordered)]])
        number = np.diff(ends)
        levels = np.where(number > 0, np.diff(sums[ends]) / np.maximum(number, 1), levels)
    return levels
