"""Codec `transform:RATE`: a KLT over features and a DCT over time, RATE bits a value.

    transform:1     an eighth of int8's bytes, transform:0.5 a sixteenth; a block has 2 RATE D bytes

A block has T = 16 consecutive frames of one utterance. Encoding it:

    1. subtract the layer's mean, project onto K of the D eigenvectors of the layer's covariance (KLT), transform each
       projection along the block by the orthonormal DCT-II: T K coefficients;
    2. divide each coefficient by its deviation, and by the block's gain of its band: band 0 is row 0 of the DCT, the
       mean over the block; band 1 is the other rows. Hidden states have loud frames, which would otherwise set the
       levels of all;
    3. code each by a scalar quantiser of 0 to 8 bits. The bits are fixed for a store and layer (reverse water-filling),
       so that all blocks have the same bytes and any of them can be read alone.

The parameters of all steps are fitted to a sample of each store (`extract.store.transform_fit`) and stored beside the
codes. Decoding is a table look-up and two matrix products. numpy and torch, and a slice and the whole, agree within the
rounding of those products, not bit for bit as other codecs do.

A block's bytes, lowest bit first: the two gains, 4 bits each; then bit 0 of every coefficient that has bits, bit 1 of
those with at least two, and so on. Coefficients are in descending order of their bits, then in that of (DCT row,
direction), so that each of these planes is a prefix of the one before it.

Shapes: L layers, F frames, B blocks, T = 16, D features, K directions, N coefficients with bits, W bytes of a block,
E = 2 bands, G = 16 gains, Q numbers of bits (0 to 8), V levels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.store.codec import Array, Codec, Parameters

BLOCK_FRAMES = 16
MOST_BITS = 8  # of a coefficient
NUM_BANDS, NUM_GAINS = 2, 16
LEAST_GAIN = 1e-4  # of a block without signal in a band
MOST_RATE = 4  # bits a value: above it levels are wasted, int4 and int8 lose less

_LARGEST = 1e15  # deviations
_CACHED_BLOCKS = 128  # of one layer at a time in numpy: the fewest at which matrix products are fast
_SHAPES = {"mean": "LD", "basis": "LKD", "bits": "LTK", "deviation": "LTK", "gains": "LEG", "levels": "LQV"}
_DTYPES = {name: "uint8" if name == "bits" else "float32" for name in _SHAPES}


def dct_matrix(num_frames: int) -> NDArray[np.float32]:
    """Return the orthonormal DCT-II, float32 (T, T): row k is the cosine of k half periods."""
    k, t = np.ogrid[:num_frames, :num_frames]
    matrix = np.sqrt(2 / num_frames) * np.cos(np.pi / num_frames * (t + 0.5) * k)
    matrix[0] /= np.sqrt(2)
    rounded: NDArray[np.float32] = matrix.astype(np.float32)
    return rounded


@dataclass(frozen=True)
class _Layer:
    """Parameters of one layer in the order of its codes, as arrays of numpy or of one device of torch.

    S coefficients are computed: of each row of the DCT the directions up to the last one that has bits in that row.
    Bits fall with the row and the direction, so that S is little more than N: 0.26 T D at 0.5 bits a value. Hence the
    DCT comes before the KLT, and the reverse in decoding. Arrays of coefficients have blocks along their last axis:
    equal bits, edges and deviations then lie in contiguous memory.
    """

    mean_D: Array
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

    @classmethod
    def of(cls, one: Parameters) -> Self:
        """Arrange the parameters of one layer, without their axis of layers."""
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
        )

    def beside(self, like: Array) -> "_Layer":
        """Return the parameters as tensors on the device of a tensor; unchanged for a numpy array."""
        if isinstance(like, np.ndarray):
            return self
        empty = like.new_empty(0)  # gives its device to new tensors
        moved = {
            name: (empty.float() if value.dtype.kind == "f" else empty.long()).new_tensor(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }
        return _Layer(**(vars(self) | moved))

    def encode(self, codes_BW: Array, hidden_FD: Array) -> None:
        """Encode blocks of frames, float32 (B T, D), into bytes (B, W)."""
        num_blocks, num_bytes = codes_BW.shape
        spectrum_BTD = self.dct_TT @ (hidden_FD - self.mean_D).reshape(num_blocks, BLOCK_FRAMES, -1)
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
        code_NB = _zeros(codes_BW, tuple(value_NB.shape))
        for number, first, end in self.groups:
            code_NB[first:end] = _counted(value_NB[first:end], self.edges_QV[number, : (1 << number) - 1])
        bits = _zeros(codes_BW, (8 * num_bytes, num_blocks))
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

    def decode(self, codes_BW: Array) -> Array:
        """Decode blocks, bytes (B, W), to their frames, float32 (B T, D)."""
        num_blocks, num_bytes = codes_BW.shape
        bits = _zeros(codes_BW, (8 * num_bytes, num_blocks))
        for bit in range(8):
            bits[bit::8] = (codes_BW.T >> bit) & 1
        code_NB = _zeros(codes_BW, (len(self.place_N), num_blocks))
        start = 8
        for bit, num in enumerate(self.prefixes):
            code_NB[:num] |= bits[start : start + num] << bit
            start += num
        value_NB = _zeros(self.basis_KD, tuple(code_NB.shape))
        for number, first, end in self.groups:
            value_NB[first:end] = self.levels_QV[number][_indices(code_NB[first:end])]
        value_NB *= self.deviation_N1
        value_NB *= self._gains((codes_BW[:, 0] >> self.nibble_E1) & (NUM_GAINS - 1))
        coefficient_SB = _zeros(value_NB, (self.rows[-1][2], num_blocks))
        coefficient_SB[self.place_N] = value_NB
        spectrum_BTD = _zeros(value_NB, (num_blocks, BLOCK_FRAMES, len(self.mean_D)))
        for row, first, end in self.rows:
            spectrum_BTD[:, row] = coefficient_SB[first:end].T @ self.basis_KD[: end - first]
        out_FD = (self.dct_TT.T @ spectrum_BTD).reshape(num_blocks * BLOCK_FRAMES, -1)
        out_FD += self.mean_D
        return out_FD

    def _gains(self, code_EB: Array) -> Array:
        """Return the gain of every coefficient of every block, float32 (N, B)."""
        return self.gains[code_EB + self.gain_row_E1][self.band_N]


class Transform(Codec):
    """Codec `transform:RATE`, without parameters (sizes are known) or with those of the layers that it is used for."""

    dtype: ClassVar[str] = "uint8"
    block_frames: ClassVar[int] = BLOCK_FRAMES
    cached_frames: ClassVar[int] = _CACHED_BLOCKS * BLOCK_FRAMES
    needs_fit: ClassVar[bool] = True

    def __init__(self, rate: float, parameters: Parameters | None = None) -> None:
        if not 0 < rate <= MOST_RATE:
            raise RetortError(
                f"codec transform:{rate:g}: expected a rate above 0 and up to {MOST_RATE} bits a value; use int4 or "
                "int8 for more"
            )
        self.name = f"transform:{rate:g}"
        self.rate = rate
        self.parameters = parameters
        self._arranged: dict[tuple[int, Any], _Layer] = {}  # by layer, and by device
        self._selected: dict[tuple[int, ...], Transform] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Transform, (self.rate, self.parameters)  # without tensors of a device

    def width(self, dim: int) -> int:
        width = 2 * self.rate * dim  # BLOCK_FRAMES / 8 bytes for each bit a value
        if abs(width - round(width)) > 1e-6 or width < 2:
            raise RetortError(
                f"codec {self.name} stores {BLOCK_FRAMES} frames of {dim} features in {width:g} bytes, expected a "
                f"whole number from 2 up; use a rate that is a multiple of 1/{2 * dim}"
            )
        return round(width)

    def dim(self, width: int) -> int:
        return round(width / (2 * self.rate))

    def num_bits(self, dim: int) -> int:
        """Return the bits of all coefficients of a block: those of its bytes but the first, which holds the gains."""
        return 8 * self.width(dim) - 8

    def parameter_bytes(self, num_layers: int, dim: int) -> int:
        kept = min(dim, self.num_bits(dim))  # directions: each has a bit at least
        sizes = {"L": num_layers, "K": kept, "D": dim, "T": BLOCK_FRAMES, "E": NUM_BANDS, "G": NUM_GAINS}
        sizes |= {"Q": MOST_BITS + 1, "V": 1 << MOST_BITS}
        return sum(
            math.prod(sizes[axis] for axis in axes) * np.dtype(_DTYPES[name]).itemsize for name, axes in _SHAPES.items()
        )

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        return None, first_frame % BLOCK_FRAMES

    def of_layers(self, places: Sequence[int]) -> "Transform":
        assert self.parameters is not None
        chosen = tuple(places)
        if chosen == tuple(range(len(self.parameters["mean"]))):
            return self
        if chosen not in self._selected:  # kept, with what it moves to a device
            found = {name: values[list(chosen)] for name, values in self.parameters.items()}
            self._selected[chosen] = Transform(self.rate, found)
        return self._selected[chosen]

    def encode_into(self, codes_LRW: Array, scale: Array | None, hidden_LFD: Array) -> None:
        for layer, (hidden_FD, codes_BW) in enumerate(zip(hidden_LFD, codes_LRW, strict=True)):
            parameters = self._layer(layer, hidden_FD)
            for blocks in _parts(codes_BW):
                frames = slice(blocks.start * BLOCK_FRAMES, blocks.stop * BLOCK_FRAMES)
                parameters.encode(codes_BW[blocks], hidden_FD[frames])

    def decode_into(self, out_LFD: Array, codes_LRW: Array, scale: Array | None, rows_F: Array) -> None:
        for layer, (out_FD, codes_BW) in enumerate(zip(out_LFD, codes_LRW, strict=True)):
            parameters = self._layer(layer, out_FD)
            decoded_FD = _zeros(out_FD, (len(codes_BW) * BLOCK_FRAMES, out_FD.shape[1]))
            for blocks in _parts(codes_BW):
                frames = slice(blocks.start * BLOCK_FRAMES, blocks.stop * BLOCK_FRAMES)
                decoded_FD[frames] = parameters.decode(codes_BW[blocks])
            out_FD[...] = decoded_FD[rows_F]

    def _layer(self, layer: int, like: Array) -> _Layer:
        """Return a layer's parameters beside an array; they are moved to a device once."""
        key = layer, None if isinstance(like, np.ndarray) else like.device
        if key not in self._arranged:
            assert self.parameters is not None, f"{self.name} has no parameters"
            one = {name: values[layer] for name, values in self.parameters.items()}
            self._arranged[key] = _Layer.of(one).beside(like)
        return self._arranged[key]

    def fitted(self, parameters: Parameters, shape: tuple[int, int] | None = None) -> "Transform":
        if found := sorted(set(_SHAPES) ^ set(parameters)):
            raise RetortError(f"parameters of codec {self.name}: {found[0]}: expected {', '.join(sorted(_SHAPES))}")
        sizes: dict[str, int] = {"T": BLOCK_FRAMES, "E": NUM_BANDS, "G": NUM_GAINS, "Q": MOST_BITS + 1}
        sizes["V"] = 1 << MOST_BITS
        if shape is not None:
            sizes["L"], sizes["D"] = shape
        for name, axes in _SHAPES.items():
            values = parameters[name]
            found_sizes = zip(axes, values.shape, strict=False)
            # The first array with an axis decides its size.
            if values.ndim != len(axes) or any(sizes.setdefault(axis, size) != size for axis, size in found_sizes):
                expected = ", ".join(str(sizes.get(axis, "any")) for axis in axes)
                raise self._refused(name, f"shape {values.shape}, expected ({expected})")
            if values.dtype != _DTYPES[name]:
                raise self._refused(name, f"{values.dtype}, expected {_DTYPES[name]}")
            if not np.isfinite(values).all():
                raise self._refused(name, "values that are not finite")
        self._check_values(parameters)
        return Transform(self.rate, parameters)

    def _check_values(self, parameters: Parameters) -> None:
        bits, most = parameters["bits"], self.num_bits(parameters["mean"].shape[1])
        if (bits > MOST_BITS).any() or (spent := bits.sum((1, 2), dtype=np.int64)).max() > most or not spent.min():
            raise self._refused("bits", f"expected 1 to {most} bits in each layer, {MOST_BITS} at most a coefficient")
        if (parameters["deviation"][bits > 0] <= 0).any():
            raise self._refused("deviation", "expected more than 0 for every coefficient with bits")
        if (parameters["gains"] <= 0).any() or (np.diff(parameters["gains"]) < 0).any():
            raise self._refused("gains", "expected ascending numbers above 0")
        for number in range(1, MOST_BITS + 1):
            if (np.diff(parameters["levels"][:, number, : 1 << number]) < 0).any():
                raise self._refused("levels", f"expected ascending levels of {number} bits")

    def _refused(self, name: str, reason: str) -> RetortError:
        return RetortError(f"parameters of codec {self.name}: {name}: {reason}")


def middles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the middle between each value and the next one of its row, of the last one itself."""
    following = np.concatenate([values[..., 1:], values[..., -1:]], axis=-1)
    middle: NDArray[np.float32] = (values + following) * np.float32(0.5)
    return middle


def _parts(codes_BW: Array) -> list[slice]:
    """Return the rows of blocks: in numpy parts that fit in the cache, in torch one part."""
    size = _CACHED_BLOCKS if isinstance(codes_BW, np.ndarray) else max(1, len(codes_BW))
    return [slice(first, min(first + size, len(codes_BW))) for first in range(0, len(codes_BW), size)]


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, dtype=like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


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
