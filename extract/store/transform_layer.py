"""One layer of codec `transform`: from the frames of blocks to their bytes, and back. numpy and torch share the code.

The bytes of a block of one layer, lowest bit first: the two gains, 4 bits each; then bit 0 of every coefficient that
has bits, bit 1 of those with at least two, and so on. Coefficients are in descending order of their bits, then in that
of (DCT row, direction), so that each of these planes is a prefix of the one before it.

Shapes as in `extract.store.transform`; S coefficients are computed: of each row of the DCT the directions up to the
last one that has bits in that row. Bits fall with the row and the direction, so that S is little more than N. Hence the
DCT comes before the KLT, and the reverse in decoding. Arrays of coefficients have blocks along their last axis: equal
bits, edges and deviations then lie in contiguous memory.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from extract.store.codec import Array, Parameters

BLOCK_FRAMES = 16
MOST_BITS = 8  # of a coefficient
NUM_BANDS, NUM_GAINS = 2, 16
LEAST_GAIN = 1e-4  # of a block without signal in a band

_LARGEST = 1e15  # deviations


def dct_matrix(num_frames: int) -> NDArray[np.float32]:
    """Return the orthonormal DCT-II, float32 (T, T): row k is the cosine of k half periods."""
    k, t = np.ogrid[:num_frames, :num_frames]
    matrix = np.sqrt(2 / num_frames) * np.cos(np.pi / num_frames * (t + 0.5) * k)
    matrix[0] /= np.sqrt(2)
    rounded: NDArray[np.float32] = matrix.astype(np.float32)
    return rounded


def section_bytes(bits_TK: NDArray[np.uint8]) -> int:
    """Return the bytes of a block of a layer: one for the gains, and those of its coefficients."""
    return 1 - -int(bits_TK.sum(dtype=np.int64)) // 8


@dataclass(frozen=True)
class Layer:
    """Parameters of one layer in the order of its codes, as arrays of numpy or of one device of torch."""

    mean_D: Array
    prediction_DD: Array
    rows_below: int  # DCT rows of the layer below that are not 0
    basis_KD: Array
    dct_TT: Array
    rows: tuple[tuple[int, int, int], ...]  # DCT row, and the first of its coefficients of S and the end of them
    place_N: Array  # int64: place of each coefficient with bits among the S
    band_N: Array  # int64: band of each
    average_EN: Array  # float32: the product with it is the mean over each band's coefficients
    deviation_N1: Array
    groups: tuple[tuple[int, int, int], ...]  # number of bits, and the first of its coefficients of N and their end
    levels_QV: Array
    edges_QV: Array  # the bound above each level
    gain_row_E1: Array  # int64: first of each band's gains in `gains`
    gains: Array  # of all bands, end to end
    gain_edges_E1G: Array  # the bound above the logarithm of each gain but the last
    nibble_E1: Array  # int64: shift of each band's code in the first byte
    prefixes: tuple[int, ...]  # coefficients with more than 0, 1, ... bits
    num_bytes: int  # of a block

    @classmethod
    def of(cls, one: Parameters, below: "Layer | None") -> Self:
        """Arrange the parameters of one layer, without their axis of layers.

        below: the layer below, which the prediction is made from.
        """
        bits_TK = one["bits"].astype(np.int64)
        widths = [int(coded.max(initial=-1)) + 1 for coded in map(np.flatnonzero, bits_TK)]
        ends = np.cumsum(widths).tolist()
        computed_TK = np.arange(bits_TK.shape[1]) < np.array(widths)[:, None]
        bits = bits_TK[computed_TK]
        place_N = np.argsort(-bits, kind="stable")[: np.count_nonzero(bits)]
        band_N = (place_N >= widths[0]).astype(np.int64)
        member_EN = (band_N == np.arange(NUM_BANDS)[:, None]).astype(np.float32)
        prefixes = [int((bits > bit).sum()) for bit in range(MOST_BITS)]
        return cls(
            mean_D=one["mean"],
            prediction_DD=one["prediction"],
            rows_below=below.num_rows if below else 0,
            basis_KD=one["basis"],
            dct_TT=dct_matrix(BLOCK_FRAMES),
            rows=tuple((row, ends[row] - width, ends[row]) for row, width in enumerate(widths) if width),
            place_N=place_N,
            band_N=band_N,
            average_EN=member_EN / np.maximum(member_EN.sum(1, keepdims=True), 1),
            deviation_N1=one["deviation"][computed_TK][place_N, None],
            groups=tuple((bit + 1, first, end) for bit, (end, first) in enumerate(pairwise([*prefixes, 0]))),
            levels_QV=one["levels"],
            edges_QV=middles(one["levels"]),
            gain_row_E1=np.arange(NUM_BANDS)[:, None] * NUM_GAINS,
            gains=one["gains"].reshape(-1),
            gain_edges_E1G=middles(np.log2(one["gains"]))[:, None, :-1],
            nibble_E1=np.arange(NUM_BANDS)[:, None] * 4,
            prefixes=tuple(prefixes),
            num_bytes=section_bytes(one["bits"]),
        )

    @property
    def num_rows(self) -> int:
        """DCT rows of the decoded spectrum that are not 0: the first ones."""
        return max(self.rows_below, self.rows[-1][0] + 1)

    def beside(self, like: Array) -> "Layer":
        """Return the parameters as tensors on the device of a tensor; unchanged for a numpy array."""
        if isinstance(like, np.ndarray):
            return self
        empty = like.new_empty(0)  # gives its device to new tensors
        moved = {
            name: (empty.float() if value.dtype.kind == "f" else empty.long()).new_tensor(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }
        return Layer(**(vars(self) | moved))

    def spectrum(self, hidden_FD: Array) -> Array:
        """Return the DCT of the frames of blocks less their mean, float32 (B, T, D)."""
        return self.dct_TT @ (hidden_FD - self.mean_D).reshape(-1, BLOCK_FRAMES, hidden_FD.shape[1])

    def frames(self, spectrum_BTD: Array) -> Array:
        """Return the frames of a spectrum, float32 (B T, D): the inverse of `spectrum`."""
        hidden_FD = (self.dct_TT.T @ spectrum_BTD).reshape(-1, spectrum_BTD.shape[2])
        hidden_FD += self.mean_D
        return hidden_FD

    def predicted(self, below_BTD: Array | None) -> Array | None:
        """Return the spectrum that the decoded one of the layer below predicts; None without one below."""
        if below_BTD is None:
            return None
        num_blocks, _, dim = below_BTD.shape
        # One product of two matrices: a batch of small ones takes three times as long on a CPU.
        below_RD = below_BTD[:, : self.rows_below].reshape(-1, dim)
        expected_BRD = (below_RD @ self.prediction_DD.T).reshape(num_blocks, self.rows_below, dim)
        if self.rows_below == BLOCK_FRAMES:
            return expected_BRD
        expected_BTD = _zeros(below_BTD, tuple(below_BTD.shape))
        expected_BTD[:, : self.rows_below] = expected_BRD
        return expected_BTD

    def encode(self, codes_BW: Array, hidden_FD: Array, below_BTD: Array | None, *, is_last: bool) -> Array | None:
        """Encode the frames of blocks into bytes (B, W); return their decoded spectrum, of the last layer None."""
        spectrum_BTD, expected_BTD = self.spectrum(hidden_FD), self.predicted(below_BTD)
        if expected_BTD is not None:
            spectrum_BTD -= expected_BTD
        gain_EB, code_NB = self.quantised(spectrum_BTD)
        self._pack(codes_BW, gain_EB, code_NB)
        return None if is_last else self.restored(gain_EB, code_NB, expected_BTD)

    def decode(self, codes_BW: Array, below_BTD: Array | None) -> Array:
        """Decode blocks, bytes (B, W), to their spectrum, float32 (B, T, D)."""
        return self.restored(*self._unpack(codes_BW), self.predicted(below_BTD))

    def quantised(self, spectrum_BTD: Array) -> tuple[Array, Array]:
        """Return the codes of gains (E, B) and coefficients, uint8 (N, B), of a spectrum less its prediction."""
        num_blocks = len(spectrum_BTD)
        coefficient_SB = _zeros(spectrum_BTD, (self.rows[-1][2], num_blocks))
        for row, first, end in self.rows:
            coefficient_SB[first:end] = self.basis_KD[: end - first] @ spectrum_BTD[:, row].T
        value_NB = coefficient_SB[self.place_N]
        value_NB /= self.deviation_N1
        value_NB = value_NB.clip(-_LARGEST, _LARGEST)  # squares of larger values overflow float32
        # Gains by their logarithms, from the root mean square of each band: log2 of the root is half that of the power.
        power_EB = (self.average_EN @ (value_NB * value_NB)).clip(LEAST_GAIN**2)
        gain_EB = (_log2(power_EB)[..., None] * 0.5 > self.gain_edges_E1G).sum(-1)
        value_NB /= self._gains(gain_EB)
        code_NB = _bytes(value_NB)
        for number, first, end in self.groups:
            code_NB[first:end] = _counted(value_NB[first:end], self.edges_QV[number, : (1 << number) - 1])
        return gain_EB, code_NB

    def restored(self, gain_EB: Array, code_NB: Array, expected_BTD: Array | None) -> Array:
        """Return the spectrum of codes, added to its prediction, whose memory it takes."""
        value_NB = _zeros(self.basis_KD, tuple(code_NB.shape))
        for number, first, end in self.groups:
            value_NB[first:end] = self.levels_QV[number][_indices(code_NB[first:end])]
        value_NB *= self.deviation_N1
        value_NB *= self._gains(gain_EB)
        coefficient_SB = _zeros(value_NB, (self.rows[-1][2], value_NB.shape[1]))
        coefficient_SB[self.place_N] = value_NB
        if expected_BTD is None:
            expected_BTD = _zeros(value_NB, (value_NB.shape[1], BLOCK_FRAMES, len(self.mean_D)))
        for row, first, end in self.rows:
            expected_BTD[:, row] += coefficient_SB[first:end].T @ self.basis_KD[: end - first]
        return expected_BTD

    def _pack(self, codes_BW: Array, gain_EB: Array, code_NB: Array) -> None:
        bits = _zeros(codes_BW, (8 * self.num_bytes, len(codes_BW)))
        for bit in range(4):
            bits[bit:8:4] = (gain_EB >> bit) & 1
        start = 8
        for bit, num in enumerate(self.prefixes):
            bits[start : start + num] = (code_NB[:num] >> bit) & 1
            start += num
        bytes_WB = bits[7::8]
        for bit in range(6, -1, -1):
            bytes_WB = (bytes_WB << 1) | bits[bit::8]
        codes_BW[...] = bytes_WB.T

    def _unpack(self, codes_BW: Array) -> tuple[Array, Array]:
        """Return the codes of gains (E, B) and coefficients, uint8 (N, B)."""
        bits = _zeros(codes_BW, (8 * self.num_bytes, len(codes_BW)))
        for bit in range(8):
            bits[bit::8] = (codes_BW.T >> bit) & 1
        code_NB = _zeros(codes_BW, (len(self.place_N), len(codes_BW)))
        start = 8
        for bit, num in enumerate(self.prefixes):
            code_NB[:num] |= bits[start : start + num] << bit
            start += num
        return (codes_BW[:, 0] >> self.nibble_E1) & (NUM_GAINS - 1), code_NB

    def _gains(self, code_EB: Array) -> Array:
        """Return the gain of every coefficient of every block, float32 (N, B)."""
        return self.gains[code_EB + self.gain_row_E1][self.band_N]


def middles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the middle between each value and the next one of its row, of the last one itself."""
    following = np.concatenate([values[..., 1:], values[..., -1:]], axis=-1)
    middle: NDArray[np.float32] = (values + following) * np.float32(0.5)
    return middle


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, dtype=like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _bytes(like: Array) -> Array:
    """Return zeros, uint8, in the shape of an array."""
    return np.zeros(like.shape, dtype=np.uint8) if isinstance(like, np.ndarray) else like.new_zeros(like.shape).byte()


def _indices(codes: Array) -> Array:
    """Return codes as indices; torch takes a tensor of bytes for a mask."""
    return codes if isinstance(codes, np.ndarray) else codes.long()


def _counted(values: Array, edges: Array) -> Array:
    """Return how many of ascending edges, 2^b - 1 in all, lie below each value."""
    if isinstance(values, np.ndarray):  # a comparison with one number is faster than a step of a search
        count = np.zeros(values.shape, dtype=np.uint8)
        for edge in edges:
            count += (values > edge).view(np.uint8)
        return count
    count = values.new_zeros(values.shape).long()
    for bit in range(len(edges).bit_length() - 1, -1, -1):
        count += (values > edges[count + ((1 << bit) - 1)]) * (1 << bit)
    return count


def _log2(values: Array) -> Array:
    return np.log2(values) if isinstance(values, np.ndarray) else values.log2()
