"""Fit of codec `transform` to a sample of hidden states: one layer after another, in numpy, the same on every run.

    1. prediction: least squares of the layer's spectrum on the decoded spectrum of the layer below;
    2. KLT: eigenvectors of the covariance of what is left, directions of large variance first;
    3. deviations and gains: gains follow from deviations and the reverse, so each is estimated from the other twice;
    4. bits: each goes to the coefficient whose expected squared error it lowers most, with the errors of the best
       quantisers of a normal variable (Max, 1960): reverse water-filling in whole bits;
    5. levels: one Lloyd-Max quantiser for each number of bits, of all coefficients with that many. One for each
       coefficient lost up to 2 dB on held-out utterances, as few of its values are in the sample's tails.

How many bytes of a block each layer has is found first, on a part of the sample, with errors in units of the layer's
variance: a layer that is easy to predict or to transform leaves its bytes to the others. A division changes what is
left of every layer, hence a few rounds.

Shapes as in `extract.store.transform`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.store.transform import Transform
from extract.store.transform_layer import (
    BLOCK_FRAMES,
    LEAST_GAIN,
    MOST_BITS,
    NUM_BANDS,
    NUM_GAINS,
    Layer,
    dct_matrix,
    middles,
)

SAMPLE_FRAMES = 65_536  # in all packs of the sample
_ROUNDS = 2  # of gains and deviations
_OCTAVES_ABOVE = 0.5  # of the largest gain above the loudest block of the sample
_LLOYD_ROUNDS = 50
_LLOYD_VALUES = 1 << 18
_ROWS = 4096  # frames whose float64 covariance is added at a time
_SHARE_FRAMES = 8192  # of each layer, all in memory, on which the bytes are divided
_SHARE_ROUNDS = 3
_RIDGE = 1e-4  # of the mean variance of a decoded feature: directions that are hardly coded predict nothing
_LEAST_DEVIATION = 1e-6  # of the largest value: below it a layer is constant but for rounding
# Squared errors of quantisers of 0 to 8 bits of a normal variable of variance 1; a quarter a bit beyond 5 bits.
_NORMAL_ERRORS = np.array([1, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000625, 0.000156, 0.000039])

Values = NDArray[np.float32]


def fit(
    codec: Transform, sample: Callable[[], Iterable[Values]], names: Sequence[str]
) -> dict[str, NDArray[np.generic]]:
    """Return the parameters of a codec for layers that are given one after another, from below.

    sample: called for each pass, two of several layers; yields float32 (F, D) of each layer, whose blocks of 16 rows
    lie inside utterances. names: of the layers, for errors. Raises RetortError for values that are not finite and for a
    layer without variance.
    """
    shares = _shares(codec, [_thinned(hidden_FD) for hidden_FD in sample()], names) if len(names) > 1 else None
    fitted = [one for one, _ in _fit_layers(codec, sample(), shares, names)]
    num_kept = max(one["basis"].shape[0] for one in fitted)
    whole = {name: np.stack([_widened(one[name], name, num_kept) for one in fitted]) for name in fitted[0]}
    codec.fitted(whole)  # raises for an error of this module
    return whole


def fitted_to(codec: Transform, layers_LFD: Sequence[Values] | Values) -> Transform:
    """Return the codec with parameters for layers in memory, float32 (F, D) each."""
    names = [f"layer number {place}" for place in range(len(layers_LFD))]
    return codec.fitted(fit(codec, lambda: layers_LFD, names))


def _widened(values: NDArray[np.generic], name: str, num_kept: int) -> NDArray[np.generic]:
    """Append directions without bits, so that layers with fewer directions have as many as the others."""
    if name not in ("basis", "bits", "deviation"):
        return values
    axis = 0 if name == "basis" else 1
    widths = [(0, num_kept - size if at == axis else 0) for at, size in enumerate(values.shape)]
    return np.pad(values, widths)


def _thinned(hidden_FD: Values) -> Values:
    """Return blocks of a layer's sample, a copy."""
    step = -(-len(hidden_FD) // _SHARE_FRAMES)
    blocks_BTD = hidden_FD.reshape(-1, BLOCK_FRAMES, hidden_FD.shape[1])[::step]
    return blocks_BTD.reshape(-1, hidden_FD.shape[1]).copy()


def _shares(codec: Transform, layers_FD: Sequence[Values], names: Sequence[str]) -> list[int]:
    """Return the bytes of a block that each layer has."""
    width, num_layers = codec.width(layers_FD[0].shape[1]), len(layers_FD)
    shares: list[int] | None = None
    for _ in range(_SHARE_ROUNDS):
        lost_LTD = np.stack([lost_TD for _, lost_TD in _fit_layers(codec, layers_FD, shares, names)])
        # Of each layer one byte has the gains, and one is its own: the least that a layer can have.
        free = num_layers * (width - 2)
        bits_L = _allocated(lost_LTD, 8 * free).sum((1, 2), dtype=np.int64)
        shares_L = 2 + bits_L // 8
        left = num_layers * width - int(shares_L.sum())
        shares_L[np.argsort(-(bits_L % 8), kind="stable")[: left % num_layers]] += 1
        shares = (shares_L + left // num_layers).tolist()
    assert shares is not None
    return shares


def _fit_layers(
    codec: Transform, layers_FD: Iterable[Values], shares: Sequence[int] | None, names: Sequence[str]
) -> Iterator[tuple[dict[str, NDArray[np.generic]], NDArray[np.float64]]]:
    """Yield the parameters of each layer, and the variance of its coefficients in units of the layer's, (T, D).

    shares: bytes of a block that each layer has; None: equal ones.
    """
    below_BTD: Values | None = None
    layer: Layer | None = None
    for place, (hidden_FD, name) in enumerate(zip(layers_FD, names, strict=True)):
        if not np.isfinite(hidden_FD).all():
            raise RetortError(f"codec {codec.name}: the sample's values of {name} are not finite")
        mean_D = hidden_FD.mean(0, dtype=np.float64).astype(np.float32)
        rest_BTD = (hidden_FD - mean_D).reshape(-1, BLOCK_FRAMES, len(mean_D))
        for blocks in _parts(rest_BTD):
            rest_BTD[blocks] = dct_matrix(BLOCK_FRAMES) @ rest_BTD[blocks]
        power = float(np.square(rest_BTD).mean(dtype=np.float64))
        least = max(_LEAST_DEVIATION * float(np.abs(hidden_FD).max()), float(np.finfo(np.float32).tiny))
        if not power > least**2:
            raise RetortError(f"codec {codec.name}: {name} has no variance; use --codec int8")
        prediction_DD = np.zeros((len(mean_D), len(mean_D)), dtype=np.float32)
        if below_BTD is not None:
            prediction_DD = _prediction(below_BTD, rest_BTD)
            for blocks in _parts(rest_BTD):
                below_RD = below_BTD[blocks].reshape(-1, len(mean_D))
                rest_BTD[blocks] -= (below_RD @ prediction_DD.T).reshape(-1, BLOCK_FRAMES, len(mean_D))
        num_bytes = shares[place] if shares else codec.width(len(mean_D))
        one, variance_TD = _fit_layer(rest_BTD, 8 * (num_bytes - 1), least)
        one |= {"mean": mean_D, "prediction": prediction_DD}
        yield one, variance_TD / power
        layer = Layer.of(one, layer)
        below_BTD = _decoded(layer, rest_BTD, below_BTD)


def _fit_layer(
    rest_BTD: Values, num_bits: int, least: float
) -> tuple[dict[str, NDArray[np.generic]], NDArray[np.float64]]:
    """Return the parameters for a spectrum less its prediction, and the variance of its coefficients, (T, D).

    least: deviation below which a coefficient is constant but for rounding.
    """
    basis_DD = _klt(rest_BTD)
    coefficient_BTD = np.empty_like(rest_BTD)
    for blocks in _parts(rest_BTD):
        rest_RD = rest_BTD[blocks].reshape(-1, len(basis_DD))
        coefficient_BTD[blocks] = (rest_RD @ basis_DD.T).reshape(-1, BLOCK_FRAMES, len(basis_DD))
    deviation_TD = _root_mean_square(coefficient_BTD).clip(least)
    variance_TD = deviation_TD.astype(np.float64) ** 2
    bits_TD = _allocated(variance_TD, num_bits)
    for _ in range(_ROUNDS):
        gains_EG, gain_BT = _gains(coefficient_BTD, deviation_TD, bits_TD)
        deviation_TD = _root_mean_square(coefficient_BTD, gain_BT).clip(least)
        power_T1 = np.square(gain_BT, dtype=np.float64).mean(0)[:, None]
        variance_TD = power_T1 * deviation_TD.astype(np.float64) ** 2
        bits_TD = _allocated(variance_TD, num_bits)
    kept = np.flatnonzero(bits_TD.any(0))[-1] + 1  # directions
    _, gain_BT = _gains(coefficient_BTD, deviation_TD, bits_TD, gains_EG)
    one: dict[str, NDArray[np.generic]] = {
        "basis": basis_DD[:kept],
        "bits": bits_TD[:, :kept],
        "deviation": np.where(bits_TD > 0, deviation_TD, np.float32(0))[:, :kept],
        "gains": gains_EG,
        "levels": _levels(coefficient_BTD, deviation_TD, gain_BT, bits_TD),
    }
    return one, variance_TD


def _parts(values_BTD: Values) -> list[slice]:
    """Return the blocks of parts whose temporary arrays are small."""
    step = _ROWS // BLOCK_FRAMES
    return [slice(first, first + step) for first in range(0, len(values_BTD), step)]


def _prediction(below_BTD: Values, spectrum_BTD: Values) -> Values:
    """Return the matrix (D, D) whose product with a decoded spectrum of the layer below is nearest to a spectrum."""
    dim = spectrum_BTD.shape[2]
    power_DD, product_DD = np.zeros((dim, dim)), np.zeros((dim, dim))
    for blocks in _parts(spectrum_BTD):
        below_RD = below_BTD[blocks].reshape(-1, dim).astype(np.float64)
        power_DD += below_RD.T @ below_RD
        product_DD += below_RD.T @ spectrum_BTD[blocks].reshape(-1, dim)
    power_DD += np.eye(dim) * (_RIDGE * np.trace(power_DD) / dim)
    prediction_DD: Values = np.linalg.solve(power_DD, product_DD).T.astype(np.float32)
    return prediction_DD


def _decoded(layer: Layer, rest_BTD: Values, below_BTD: Values | None) -> Values:
    """Return the spectrum that is decoded from the codes of one."""
    decoded_BTD = np.empty_like(rest_BTD)
    for blocks in _parts(rest_BTD):
        expected_BTD = layer.predicted(None if below_BTD is None else below_BTD[blocks])
        decoded_BTD[blocks] = layer.restored(*layer.quantised(rest_BTD[blocks]), expected_BTD)
    return decoded_BTD


def _klt(rest_BTD: Values) -> Values:
    """Return the eigenvectors of the features' covariance (D, D), a row each, of large variance first."""
    dim = rest_BTD.shape[2]
    covariance_DD = np.zeros((dim, dim))
    for blocks in _parts(rest_BTD):
        rest_RD = rest_BTD[blocks].reshape(-1, dim).astype(np.float64)
        covariance_DD += rest_RD.T @ rest_RD
    basis_DD = np.linalg.eigh(covariance_DD)[1].T[::-1]
    # Of both signs the one whose largest entry is positive: libraries of linear algebra differ in it.
    largest_D = np.take_along_axis(basis_DD, np.abs(basis_DD).argmax(1)[:, None], 1)
    signed_DD: Values = (basis_DD * np.sign(largest_D)).astype(np.float32)
    return signed_DD


def _root_mean_square(coefficient_BTD: Values, gain_BT: Values | None = None) -> Values:
    """Return the root mean square over blocks, float32 (T, D), of coefficients that are divided by their gains."""
    found_TD = np.empty(coefficient_BTD.shape[1:], dtype=np.float32)
    for row in range(len(found_TD)):  # one at a time: the temporary array is a T-th
        value_BD = coefficient_BTD[:, row] if gain_BT is None else coefficient_BTD[:, row] / gain_BT[:, row, None]
        found_TD[row] = np.sqrt(np.square(value_BD).mean(0, dtype=np.float64))
    return found_TD


def _allocated(variance: NDArray[np.float64], num_bits: int) -> NDArray[np.uint8]:
    """Return the bits of each coefficient, uint8 in the shape of their variances, at most `num_bits` in sum."""
    # A further bit of a coefficient always gains less than the one before: the largest gains are a valid choice.
    gained = (variance.reshape(-1, 1) * -np.diff(_NORMAL_ERRORS)).reshape(-1)
    chosen = np.argsort(-gained, kind="stable")[:num_bits]
    chosen = chosen[gained[chosen] > 0]
    bits = np.bincount(chosen // MOST_BITS, minlength=variance.size)
    return bits.reshape(variance.shape).astype(np.uint8)


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
