"""Interface of codecs of hidden states, and the codecs without a fit: float16, int8 and int4.

    float16   2 bytes per value
    int8      1 byte per value, and a float32 scale per pack, layer and feature
    int4      0.5 bytes per value, and a float16 step and base per 32 frames, layer and feature: 0.625 bytes

`extract.store.transform` has the codec that is fitted to each store, `extract.store.codecs` the names of all.

A codec encodes one pack and decodes a pack or consecutive frames of one. Both are written once, with the operators that
numpy arrays and torch tensors share, so that a CPU with numpy and a GPU compute the same bits. Operations whose names
differ between the two are at the end of the formulas; torch is not imported here.

Shapes: L layers (of codes: 1 if a row holds all layers), F frames, D features, R rows of codes, each of one frame or of
a block of frames, W codes of one row, G groups of T = 32 consecutive frames. `rows_F` are the rows of the frames that
are decoded, counted from the first frame that the given scale covers, or of codec `transform` the given codes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError

Codes = NDArray[np.int8] | NDArray[np.uint8] | NDArray[np.float16]
Scale = NDArray[np.float32] | NDArray[np.float16]
Parameters = Mapping[str, NDArray[Any]]  # of a fitted codec: name -> values of all layers, stacked
Array = Any  # numpy array or torch tensor; all arrays of one call are of the same kind

_BLOCK_FRAMES = 256  # of one layer: 256 x 768 float32 are 0.8 MB, which stays in a level-2 cache
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_FLOAT32_TINY = np.finfo(np.float32).tiny  # the smallest normal number


class Codec(ABC):
    """Interface of a codec. `scale_dtype` is None for a codec without a scale."""

    name: str
    dtype: ClassVar[str]  # of the codes
    scale_dtype: ClassVar[str | None] = None
    values_per_code: ClassVar[int] = 1  # features in one code
    block_frames: ClassVar[int] = 1  # frames in one row of codes; utterances start at a multiple of it
    joins_layers: ClassVar[bool] = False  # True: a row holds the codes of all layers, whose axis then has one place
    cached_frames: ClassVar[int] = _BLOCK_FRAMES  # frames of one layer that numpy decodes at a time
    needs_fit: ClassVar[bool] = False  # True: only a codec with the parameters of a store encodes and decodes
    largest: ClassVar[float] = math.inf  # absolute value that can be encoded

    def width(self, dim: int) -> int:
        """Return W, the codes of one row and layer. Raises RetortError for a dim that the codec can't store."""
        if dim % self.values_per_code:
            raise RetortError(
                f"codec {self.name} stores {self.values_per_code} features in a code and needs a dim that divides by "
                f"{self.values_per_code}, got {dim}; use --codec int8"
            )
        return dim // self.values_per_code

    def dim(self, width: int) -> int:
        """Return the features of rows of `width` codes, the inverse of `width`."""
        return width * self.values_per_code

    def num_rows(self, num_frames: int) -> int:
        """Return R, the rows of codes of frames: that many, or that many blocks."""
        return -(-num_frames // self.block_frames)

    @property
    def of_stem(self) -> "Codec":
        """The codec of the stem's output in a store of this codec, without parameters."""
        return self

    def codes_shape(self, num_layers: int, num_frames: int, dim: int) -> tuple[int, int, int]:
        """Return the shape of the codes of layers; a codec with the parameters of a store counts the layers of that."""
        return num_layers, self.num_rows(num_frames), self.width(dim)

    def values_shape(self, codes_shape: Sequence[int], num_frames: int) -> tuple[int, int, int]:
        """Return the shape of the values, (L, F, D), of which codes of this shape hold `num_frames` frames."""
        return codes_shape[0], num_frames, self.dim(codes_shape[2])

    def apart(self, num_layers: int) -> list[slice]:
        """Return the places on the axis of layers that are best decoded at a time: one each, if codes allow it."""
        return [slice(None)] if self.joins_layers else [slice(place, place + 1) for place in range(num_layers)]

    def code_rows(self, first_frame: int, num_frames: int) -> slice:
        """Return the rows of a pack's codes that hold consecutive frames of it."""
        return slice(first_frame // self.block_frames, self.num_rows(first_frame + num_frames))

    def of_layers(self, places: Sequence[int]) -> "Codec":
        """Return the codec of a selection of layers, given by their places on the axis of layers."""
        return self

    def fitted(self, parameters: Parameters, shape: tuple[int, int] | None = None) -> "Codec":
        """Return the codec with the parameters of a store; a codec without a fit as it is.

        shape: the numbers of layers and features that they must be of. Raises RetortError for other parameters.
        """
        return self

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...] | None:
        """Return the shape of the scale of one layer of a pack, None for a codec without a scale."""
        return None

    def nbytes(self, num_layers: int, num_frames: int, dim: int) -> int:
        """Return the bytes of the codes and the scale of one pack."""
        size = math.prod(self.codes_shape(num_layers, num_frames, dim)) * np.dtype(self.dtype).itemsize
        if (shape := self.scale_shape(num_frames, dim)) is not None:
            size += num_layers * math.prod(shape) * np.dtype(self.scale_dtype).itemsize
        return size

    def parameter_bytes(self, num_layers: int, dim: int) -> int:
        """Return the bytes of the parameters of layers, at most: 0 of a codec without a fit."""
        return 0

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale | None]:
        """Encode one pack, float32 (L, F, D): codes (L, R, W), scale (L, ...). Raises RetortError if out of range.

        F is a multiple of `block_frames`.
        """
        num_layers, num_frames, dim = hidden_LFD.shape
        assert num_frames % self.block_frames == 0
        codes_LRW = np.empty(self.codes_shape(num_layers, num_frames, dim), dtype=self.dtype)
        shape = self.scale_shape(num_frames, dim)
        scale = None if shape is None else np.empty((num_layers, *shape), dtype=self.scale_dtype)
        if self.largest < math.inf and (peak := _peak(hidden_LFD)) > self.largest:
            raise RetortError(f"hidden states reach {peak:.3g}, the largest float16 is 65504; use --codec int8")
        self.encode_into(codes_LRW, scale, hidden_LFD)
        return codes_LRW, scale

    @abstractmethod
    def encode_into(self, codes_LRW: Array, scale: Array | None, hidden_LFD: Array) -> None:
        """Encode one pack, float32 (L, F, D), into codes (L, R, W) and a scale (L, ...).

        Codes of layers with a value beyond `largest` are undefined.
        """

    @abstractmethod
    def decode_into(self, out_LFD: Array, codes_LRW: Array, scale: Array | None, rows_F: Array) -> None:
        """Decode codes (L, R, W) into `out`, float32 (L, F, D). The scale is that of the whole pack or of `span`."""

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        """Return the part of a pack's scale that consecutive frames need, and the row of the first of them in it.

        The row is that in the codes of `code_rows` if a row of codes holds a block of frames.
        """
        return scale, first_frame

    def decode(
        self, codes_LRW: Codes, scale: Scale | None, *, first_frame: int = 0, num_frames: int | None = None
    ) -> NDArray[np.float32]:
        """Decode consecutive frames of a pack, from `first_frame` on, with the pack's scale: float32 (L, F, D).

        codes: those of `code_rows`. num_frames: None for all frames of the codes.
        """
        if num_frames is None:
            num_frames = codes_LRW.shape[1] * self.block_frames - first_frame % self.block_frames
        hidden_LFD = np.empty(self.values_shape(codes_LRW.shape, num_frames), dtype=np.float32)
        scale, row = self.span(scale, first_frame, num_frames)
        self.decode_into(hidden_LFD, codes_LRW, scale, np.arange(row, row + num_frames))
        return hidden_LFD


class Float16(Codec):
    """Two bytes per value; relative error at most 2^-11 in float16's normal range."""

    name = "float16"
    dtype = "float16"
    largest = _FLOAT16_MAX

    def encode_into(self, codes_LRW: Array, scale: Array | None, hidden_LFD: Array) -> None:
        codes_LRW[...] = hidden_LFD  # the assignment rounds to the nearest float16

    def decode_into(self, out_LFD: Array, codes_LRW: Array, scale: Array | None, rows_F: Array) -> None:
        out_LFD[...] = codes_LRW  # the assignment widens float16 to float32


class Int8(Codec):
    """One byte per value: code = round(value / scale), with scale = max |value| / 127 by pack, layer and feature."""

    name = "int8"
    dtype = "int8"
    scale_dtype = "float32"

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...]:
        return (dim,)

    def encode_into(self, codes_LRW: Array, scale: Array | None, hidden_LFD: Array) -> None:
        assert scale is not None
        for hidden_FD, codes_FD, scale_D in zip(hidden_LFD, codes_LRW, scale, strict=True):
            low_D, high_D = _range(hidden_FD, 0)
            scale_D[...] = _divided(abs(high_D.clip(-low_D)), 127)  # clip: the larger of the two
            # A subnormal scale is too coarse to hold 127 steps, so that codes would wrap around: such features are 0.
            scale_D *= scale_D >= _FLOAT32_TINY
            divisor_D = scale_D + (scale_D == 0)
            for rows in _blocks(hidden_FD, len(hidden_FD)):
                codes_FD[rows] = _rounded(hidden_FD[rows] / divisor_D)  # -127 to 127

    def decode_into(self, out_LFD: Array, codes_LRW: Array, scale: Array | None, rows_F: Array) -> None:
        assert scale is not None
        out_LFD[...] = codes_LRW
        out_LFD *= scale[:, None]  # (L, 1, D)


class Int4(Codec):
    """Half a byte per value: value = code * step + base, code -8 to 7, step and base by group, layer and feature.

    Hidden states change slowly from frame to frame, so 32 frames of a feature cover a part of the range of the pack,
    and that part is not centred on zero: hence groups, and a base beside the step. On the demo teacher over AN4 this
    gives 26.5 dB. Steps without bases, which for the same 0.625 bytes can change every 16 frames, give 23.7 dB.

    A byte holds feature d in its low and feature d + D/2 in its high half, both in two's complement. The scale of a
    layer is float16 (G, 2, D): steps, then bases. The last group of a pack may be shorter.
    """

    name = "int4"
    dtype = "int8"
    scale_dtype = "float16"
    values_per_code = 2
    largest = _FLOAT16_MAX
    group_frames: ClassVar[int] = 32

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...]:
        return (-(-num_frames // self.group_frames), 2, dim)  # G is rounded up

    def encode_into(self, codes_LRW: Array, scale: Array | None, hidden_LFD: Array) -> None:
        assert scale is not None
        num_frames, dim = hidden_LFD.shape[1:]
        half, whole = self.width(dim), num_frames // self.group_frames * self.group_frames
        for hidden_FD, codes_FW, scale_G2D in zip(hidden_LFD, codes_LRW, scale, strict=True):
            # Blocks of whole groups, then the last group if it is shorter.
            for rows in (*_blocks(hidden_FD, whole), *[slice(whole, num_frames)] * (whole < num_frames)):
                grouped_GTD = hidden_FD[rows].reshape(-1, min(self.group_frames, rows.stop - rows.start), dim)
                step_GD, base_GD = _step_and_base(*_range(grouped_GTD, 1))
                first = rows.start // self.group_frames
                scale_G2D[first : first + len(step_GD), 0] = step_GD
                scale_G2D[first : first + len(step_GD), 1] = base_GD
                levels_GTD = grouped_GTD - base_GD[:, None]
                levels_GTD /= (step_GD + (step_GD == 0))[:, None]
                codes_FD = _int8(_rounded(levels_GTD)).reshape(-1, dim)
                codes_FW[rows] = (codes_FD[:, half:] << 4) | (codes_FD[:, :half] & 15)  # two features in a byte

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        assert scale is not None
        first_group, row = divmod(first_frame, self.group_frames)
        return scale[:, first_group : -(-(first_frame + num_frames) // self.group_frames)], row

    def decode_into(self, out_LFD: Array, codes_LRW: Array, scale: Array | None, rows_F: Array) -> None:
        assert scale is not None
        half, groups_F = codes_LRW.shape[-1], rows_F // self.group_frames
        # Layer by layer: steps and bases expanded to (F, D) then take the memory of one layer.
        for out_FD, codes_FW, scale_G2D in zip(out_LFD, codes_LRW, scale, strict=True):
            wide_G2D = _float32(scale_G2D)
            out_FD[:, :half] = (codes_FW << 4) >> 4  # arithmetic shifts of int8 restore the sign of the low half
            out_FD[:, half:] = codes_FW >> 4
            out_FD *= wide_G2D[:, 0][groups_F]
            out_FD += wide_G2D[:, 1][groups_F]


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float16(), Int8(), Int4())}  # those without a fit


def _step_and_base(low_GD: Array, high_GD: Array) -> tuple[Array, Array]:
    """Return steps and bases, float16 values in float32.

    The steps are the smallest whose levels -8 to 7 around the base reach low and high.
    """
    base_GD = _through_float16(low_GD + (high_GD - low_GD) * (8 / 15))
    # From the rounded base, and rounded up: codes then need no clipping, and no error exceeds half a step.
    exact_GD = _divided(high_GD - base_GD, 7).clip((base_GD - low_GD) / 8)
    step_GD = _through_float16(exact_GD)
    # 0.75 to 1.5 units in the last place more, in float16's normal and subnormal range, round to the next float16.
    above_GD = (step_GD * (0.75 * 2**-10)).clip(0.75 * 2**-24)
    return _through_float16(step_GD + above_GD * (step_GD < exact_GD)), base_GD


def _blocks(hidden_FD: Array, num_frames: int, cached: int = _BLOCK_FRAMES) -> list[slice]:
    """Return the rows of blocks of the first frames: in numpy blocks that fit in the cache, in torch one block."""
    size = cached if isinstance(hidden_FD, np.ndarray) else max(1, num_frames)
    return [slice(first, min(first + size, num_frames)) for first in range(0, num_frames, size)]


def _range(values: Array, axis: int) -> tuple[Array, Array]:
    """Return the smallest and the largest values along an axis."""
    if isinstance(values, np.ndarray):
        return values.min(axis=axis), values.max(axis=axis)
    return values.amin(axis), values.amax(axis)


def _divided(values: Array, number: int) -> Array:
    """Divide by a number. On CUDA torch would multiply by its reciprocal, with other bits: it is given a tensor."""
    return values / (np.float32(number) if isinstance(values, np.ndarray) else values.new_full((), number))


def _rounded(values: Array) -> Array:
    """Round to the nearest integer, half to even, in place."""
    return np.rint(values, out=values) if isinstance(values, np.ndarray) else values.round_()


def _float32(values: Array) -> Array:
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()


def _int8(values: Array) -> Array:
    return values.astype(np.int8) if isinstance(values, np.ndarray) else values.char()


def _through_float16(values: Array) -> Array:
    """Round float32 values to the nearest float16."""
    return _float32(values.astype(np.float16) if isinstance(values, np.ndarray) else values.half())


def _peak(values: NDArray[np.float32]) -> float:
    """Return the largest absolute value, 0 of nothing. Two fast passes, without an array of absolute values."""
    return max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))


@dataclass
class CodecError:
    """Error of a codec by layer, as sums over all values, so that shards can be added. All arrays are float64 (L,)."""

    error: NDArray[np.float64]  # sum of squared errors
    signal: NDArray[np.float64]  # sum of squared values
    max_abs: NDArray[np.float64]  # largest absolute error

    @classmethod
    def none(cls, num_layers: int) -> "CodecError":
        return cls(np.zeros(num_layers), np.zeros(num_layers), np.zeros(num_layers))

    @classmethod
    def of(
        cls,
        codec: Codec,
        hidden_LFD: NDArray[np.float32],
        codes_LRW: Codes,
        scale: Scale | None,
        own_F: NDArray[np.bool_] | None = None,
    ) -> "CodecError":
        """Measure the error of one whole pack, decoded in blocks that stay in the cache.

        own_F: frames that are measured; None for all.
        """
        lost = []
        for places in codec.apart(len(hidden_LFD)):
            found, own_scale = cls.none(len(hidden_LFD[places])), None if scale is None else scale[places]
            for rows in _blocks(hidden_LFD[0], hidden_LFD.shape[1], codec.cached_frames):
                count, some_LFD = rows.stop - rows.start, hidden_LFD[places, rows]
                some_LRW = codes_LRW[places, codec.code_rows(rows.start, count)]
                decoded_LFD = codec.decode(some_LRW, own_scale, first_frame=rows.start, num_frames=count)
                decoded_LFD -= some_LFD
                if own_F is not None:
                    decoded_LFD, some_LFD = decoded_LFD[:, own_F[rows]], some_LFD[:, own_F[rows]]
                found += cls._of_lost(decoded_LFD, some_LFD)
            lost.append(found)
        return cls.joined(lost)

    @classmethod
    def joined(cls, parts: Sequence["CodecError"]) -> "CodecError":
        """Concatenate the errors of several groups of layers."""
        return cls(
            np.concatenate([part.error for part in parts]),
            np.concatenate([part.signal for part in parts]),
            np.concatenate([part.max_abs for part in parts]),
        )

    @classmethod
    def between(cls, hidden_LFD: NDArray[np.float32], other_LFD: NDArray[np.float32]) -> "CodecError":
        """Measure the error of `other` against `hidden`, such as another precision of a forward pass."""
        return cls._of_lost(other_LFD - hidden_LFD, hidden_LFD)

    @classmethod
    def _of_lost(cls, lost_LFD: NDArray[np.float32], hidden_LFD: NDArray[np.float32]) -> "CodecError":
        return cls(_energy(lost_LFD), _energy(hidden_LFD), np.array([_peak(lost_FD) for lost_FD in lost_LFD]))

    def __add__(self, other: "CodecError") -> "CodecError":
        return CodecError(self.error + other.error, self.signal + other.signal, np.maximum(self.max_abs, other.max_abs))

    def to_dict(self) -> dict[str, list[float]]:
        return {
            "error": self.error.tolist(),
            "signal": self.signal.tolist(),
            "max_abs": self.max_abs.tolist(),
        }

    @classmethod
    def from_dict(cls, value: dict[str, list[float]]) -> "CodecError":
        return cls(np.array(value["error"]), np.array(value["signal"]), np.array(value["max_abs"]))

    def by_layer(self, layers: Sequence[int | str]) -> dict[str, dict[str, Any]]:
        """Return for the manifest the signal-to-noise ratio in dB (None without error) and the largest error."""
        return {
            str(layer): {
                "snr_db": round(float(10 * np.log10(signal / error)), 2) if error > 0 and signal > 0 else None,
                "max_abs_error": float(f"{peak:.4g}"),
            }
            for layer, error, signal, peak in zip(layers, self.error, self.signal, self.max_abs, strict=True)
        }


def _energy(values_LFD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sum of squares by layer, by one dot product each: this runs beside the forward pass."""
    with np.errstate(over="ignore"):
        energy = np.array([np.dot(layer.ravel(), layer.ravel()) for layer in values_LFD], dtype=np.float64)
    for layer in np.flatnonzero(np.isinf(energy)):  # squares overflow float32 beyond 1.8e19
        energy[layer] = np.square(values_LFD[layer], dtype=np.float64).sum()
    return energy
