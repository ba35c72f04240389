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
_CACHED_BLOCKS = 16  # of one layer at a time in numpy: 256 x 768 float32 stay in a level-2 cache
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
    """Parameters of one layer in the order of its codes, as arrays of numpy or of one device of torch."""

    mean_D: Array
    basis_KD: Array
    dct_TT: Array
    place_N: Array  # int64: place of each coefficient with bits in the flattened (T, K)
    band_N: Array  # int64: band of each
    average_NE: Array  # float32: the product with it is the mean over each band's coefficients
    deviation_N: Array
    level_row_N: Array  # int64: first of each coefficient's levels in `levels`
    levels: Array  # of all numbers of bits, end to end
    edges: Array  # the bound above each level
    gain_row_E: Array  # int64: first of each band's gains in `gains`
    gains: Array  # of all bands, end to end
    gain_edges_EG: Array  # the bound above the logarithm of each gain but the last
    nibble_E: Array  # int64: shift of each band's code in the first byte
    prefixes: tuple[int, ...]  # coefficients with more than 0, 1, ... bits

    @classmethod
    def of(cls, one: Parameters) -> Self:
        """Arrange the parameters of one layer, without their axis of layers."""
        bits = one["bits"].reshape(-1).astype(np.int64)
        place_N = np.argsort(-bits, kind="stable")[: np.count_nonzero(bits)]
        band_N = (place_N >= one["bits"].shape[1]).astype(np.int64)
        member_NE = (band_N[:, None] == np.arange(NUM_BANDS)).astype(np.float32)
        return cls(
            mean_D=one["mean"],
            basis_KD=one["basis"],
            dct_TT=dct_matrix(BLOCK_FRAMES),
            place_N=place_N,
            band_N=band_N,
            average_NE=member_NE / np.maximum(member_NE.sum(0), 1),
            deviation_N=one["deviation"].reshape(-1)[place_N],
            level_row_N=bits[place_N] << MOST_BITS,
            levels=one["levels"].reshape(-1),
            edges=middles(one["levels"]).reshape(-1),
            gain_row_E=np.arange(NUM_BANDS) * NUM_GAINS,
            gains=one["gains"].reshape(-1),
            gain_edges_EG=middles(np.log2(one["gains"]))[:, :-1],
            nibble_E=np.arange(NUM_BANDS) * 4,
            prefixes=tuple(int((bits > bit).sum()) for bit in range(MOST_BITS)),
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
        projected_FK = (hidden_FD - self.mean_D) @ self.basis_KD.T
        coefficient_BTK = self.dct_TT @ projected_FK.reshape(num_blocks, BLOCK_FRAMES, -1)
        value_BN = coefficient_BTK.reshape(num_blocks, -1)[:, self.place_N]
        value_BN /= self.deviation_N
        value_BN = value_BN.clip(-_LARGEST, _LARGEST)  # squares of larger values overflow float32
        # Gains by their logarithms, from the root mean square of each band: log2 of the root is half that of the power.
        power_BE = ((value_BN * value_BN) @ self.average_NE).clip(LEAST_GAIN**2)
        gain_BE = (_log2(power_BE)[..., None] * 0.5 > self.gain_edges_EG).sum(-1)
        value_BN /= self._gains(gain_BE)
        bits = _zeros(codes_BW, (num_blocks, 8 * num_bytes))
        for bit in range(4):
            bits[:, bit:8:4] = (gain_BE >> bit) & 1
        # A binary search of all coefficients at once, the highest bit first, each bit for those that have it.
        code_BN = _zeros(gain_BE, tuple(value_BN.shape))
        start = 8 + sum(self.prefixes)
        for bit, num in reversed([*enumerate(self.prefixes)]):
            start -= num
            middle_BN = code_BN[:, :num] + (self.level_row_N[:num] + ((1 << bit) - 1))
            above_BN = value_BN[:, :num] > self.edges[middle_BN]
            code_BN[:, :num] += above_BN * (1 << bit)
            bits[:, start : start + num] = above_BN
        codes_BW[...] = 0
        for bit in range(8):
            codes_BW |= bits[:, bit::8] << bit

    def project(self, codes_BW: Array) -> Array:
        """Decode blocks, bytes (B, W), to the K projections of their frames, float32 (B T, K)."""
        num_blocks, num_bytes = codes_BW.shape
        bits = _zeros(codes_BW, (num_blocks, 8 * num_bytes))
        for bit in range(8):
            bits[:, bit::8] = (codes_BW >> bit) & 1
        code_BN = _zeros(self.place_N, (num_blocks, len(self.place_N)))
        start = 8
        for bit, num in enumerate(self.prefixes):
            code_BN[:, :num] += bits[:, start : start + num] * (1 << bit)
            start += num
        value_BN = self.levels[code_BN + self.level_row_N]
        value_BN *= self.deviation_N
        value_BN *= self._gains((codes_BW[:, :1] >> self.nibble_E) & (NUM_GAINS - 1))
        coefficient_BN = _zeros(value_BN, (num_blocks, BLOCK_FRAMES * len(self.basis_KD)))
        coefficient_BN[:, self.place_N] = value_BN
        projected_BTK = self.dct_TT.T @ coefficient_BN.reshape(num_blocks, BLOCK_FRAMES, -1)
        return projected_BTK.reshape(num_blocks * BLOCK_FRAMES, -1)

    def _gains(self, code_BE: Array) -> Array:
        """Return the gain of every coefficient of every block, float32 (B, N)."""
        return self.gains[code_BE + self.gain_row_E][:, self.band_N]


class Transform(Codec):
    """Codec `transform:RATE`, without parameters (sizes are known) or with those of the layers that it is used for."""

    dtype: ClassVar[str] = "uint8"
    block_frames: ClassVar[int] = BLOCK_FRAMES
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
            projected_FK = _zeros(out_FD, (len(codes_BW) * BLOCK_FRAMES, len(parameters.basis_KD)))
            for blocks in _parts(codes_BW):
                frames = slice(blocks.start * BLOCK_FRAMES, blocks.stop * BLOCK_FRAMES)
                projected_FK[frames] = parameters.project(codes_BW[blocks])
            out_FD[...] = projected_FK[rows_F] @ parameters.basis_KD
            out_FD += parameters.mean_D

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
            shape = zip(axes, values.shape, strict=False)
            # The first array with an axis decides its size.
            if values.ndim != len(axes) or any(sizes.setdefault(axis, size) != size for axis, size in shape):
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


def _log2(values: Array) -> Array:
    return np.log2(values) if isinstance(values, np.ndarray) else values.log2()
