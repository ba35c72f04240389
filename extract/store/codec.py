"""Codecs of hidden states: float16, int8 and int4.

    float16   2 bytes per value
    int8      1 byte per value, and a float32 scale per pack, layer and feature
    int4      0.5 bytes per value, and a float16 step and base per 32 frames, layer and feature: 0.625 bytes

A codec encodes one pack and decodes a pack or consecutive frames of one. Decoding is written once, with the operators
that numpy arrays and torch tensors share, so that a reader without torch and a training device compute the same bits.

Shapes: L layers, F frames, D features, W codes of one frame, G groups of T = 32 consecutive frames. `rows_F` are the
rows of the frames, counted from the first frame that the given scale covers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError

Codes = NDArray[np.int8] | NDArray[np.float16]
Scale = NDArray[np.float32] | NDArray[np.float16]
Array = Any  # numpy array or torch tensor; all arrays of one call are of the same kind

_BLOCK_FRAMES = 256  # of one layer: 256 x 768 float32 are 0.8 MB, which stays in a level-2 cache
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_FLOAT32_TINY = np.finfo(np.float32).tiny  # the smallest normal number


class Codec(ABC):
    """Interface of a codec. `scale_dtype` is None for a codec without a scale."""

    name: ClassVar[str]
    dtype: ClassVar[str]  # of the codes
    scale_dtype: ClassVar[str | None] = None
    values_per_code: ClassVar[int] = 1  # features in one code

    def width(self, dim: int) -> int:
        """Return W, the codes of one frame and layer. Raises RetortError for a dim that is not a multiple."""
        if dim % self.values_per_code:
            raise RetortError(
                f"codec {self.name} stores {self.values_per_code} features in a code and needs a dim that divides by "
                f"{self.values_per_code}, got {dim}; use --codec int8"
            )
        return dim // self.values_per_code

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...] | None:
        """Return the shape of the scale of one layer of a pack, None for a codec without a scale."""
        return None

    def nbytes(self, num_layers: int, num_frames: int, dim: int) -> int:
        """Return the bytes of the codes and the scale of one pack."""
        size = num_frames * self.width(dim) * np.dtype(self.dtype).itemsize
        if (shape := self.scale_shape(num_frames, dim)) is not None:
            size += int(np.prod(shape)) * np.dtype(self.scale_dtype).itemsize
        return num_layers * size

    @abstractmethod
    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale | None]:
        """Encode one pack, float32 (L, F, D): codes (L, F, W), scale (L, ...). Raises RetortError if out of range."""

    @abstractmethod
    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        """Decode codes (L, F, W) into `out`, float32 (L, F, D). The scale is that of the whole pack or of `span`."""

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        """Return the part of a pack's scale that consecutive frames need, and the row of the first of them in it."""
        return scale, first_frame

    def decode(self, codes_LFW: Codes, scale: Scale | None, *, first_frame: int = 0) -> NDArray[np.float32]:
        """Decode consecutive frames of a pack, from `first_frame` on, with the pack's scale: float32 (L, F, D)."""
        num_layers, num_frames, width = codes_LFW.shape
        hidden_LFD = np.empty((num_layers, num_frames, width * self.values_per_code), dtype=np.float32)
        scale, row = self.span(scale, first_frame, num_frames)
        self.decode_into(hidden_LFD, codes_LFW, scale, np.arange(row, row + num_frames))
        return hidden_LFD


class Float16(Codec):
    """Two bytes per value; relative error at most 2^-11 in float16's normal range."""

    name = "float16"
    dtype = "float16"

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, None]:
        _check_float16_range(float(np.abs(hidden_LFD).max(initial=0.0)))
        return hidden_LFD.astype(np.float16), None

    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        out_LFD[...] = codes_LFW  # the assignment widens float16 to float32


class Int8(Codec):
    """One byte per value: code = round(value / scale), with scale = max |value| / 127 by pack, layer and feature."""

    name = "int8"
    dtype = "int8"
    scale_dtype = "float32"

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...]:
        return (dim,)

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale]:
        codes_LFD = np.empty(hidden_LFD.shape, dtype=np.int8)
        scale_LD = np.empty((len(hidden_LFD), hidden_LFD.shape[2]), dtype=np.float32)
        # Encoding runs beside the forward pass: blocks that fit in the cache take three fifths of the time.
        for hidden_FD, codes_FD, scale_D in zip(hidden_LFD, codes_LFD, scale_LD, strict=True):
            scale_D[:] = np.abs(np.maximum(hidden_FD.max(axis=0), -hidden_FD.min(axis=0))) / np.float32(127)
            # A subnormal scale is too coarse to hold 127 steps, so that codes would wrap around: such features are 0.
            scale_D[scale_D < _FLOAT32_TINY] = 0
            divisor_D = np.where(scale_D > 0, scale_D, np.float32(1))
            for first in range(0, len(hidden_FD), _BLOCK_FRAMES):
                block_FD = hidden_FD[first : first + _BLOCK_FRAMES] / divisor_D
                codes_FD[first : first + _BLOCK_FRAMES] = np.rint(block_FD, out=block_FD)  # -127 to 127
        return codes_LFD, scale_LD

    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        assert scale is not None
        out_LFD[...] = codes_LFW
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
    group_frames: ClassVar[int] = 32

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...]:
        return (-(-num_frames // self.group_frames), 2, dim)  # G is rounded up

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale]:
        num_layers, num_frames, dim = hidden_LFD.shape
        half, shape = self.width(dim), self.scale_shape(num_frames, dim)
        codes_LFW = np.empty((num_layers, num_frames, half), dtype=np.int8)
        scale_LG2D = np.empty((num_layers, *shape), dtype=np.float16)
        # One buffer for all layers: encoding runs beside the forward pass, and fresh pages would be half of its cost.
        grouped_GTD = np.empty((shape[0], self.group_frames, dim), dtype=np.float32)
        values_FD = grouped_GTD.reshape(-1, dim)
        for layer, hidden_FD in enumerate(hidden_LFD):
            values_FD[:num_frames] = hidden_FD
            values_FD[num_frames:] = hidden_FD[-1]  # fills the last group without widening its range
            step_GD, base_GD = _step_and_base(grouped_GTD.min(axis=1), grouped_GTD.max(axis=1))
            scale_LG2D[layer, :, 0], scale_LG2D[layer, :, 1] = step_GD, base_GD
            grouped_GTD -= base_GD.astype(np.float32)[:, None]
            grouped_GTD /= np.where(step_GD > 0, step_GD, np.float16(1)).astype(np.float32)[:, None]
            np.rint(grouped_GTD, out=grouped_GTD)
            codes_FD = values_FD[:num_frames].astype(np.int8)
            codes_LFW[layer] = (codes_FD[:, half:] << 4) | (codes_FD[:, :half] & 15)  # two features in a byte
        return codes_LFW, scale_LG2D

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        assert scale is not None
        first_group, row = divmod(first_frame, self.group_frames)
        return scale[:, first_group : -(-(first_frame + num_frames) // self.group_frames)], row

    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        assert scale is not None
        half, groups_F = codes_LFW.shape[-1], rows_F // self.group_frames
        # Layer by layer: steps and bases expanded to (F, D) then take the memory of one layer.
        for out_FD, codes_FW, scale_G2D in zip(out_LFD, codes_LFW, scale, strict=True):
            wide_G2D = _float32(scale_G2D)
            out_FD[:, :half] = (codes_FW << 4) >> 4  # arithmetic shifts of int8 restore the sign of the low half
            out_FD[:, half:] = codes_FW >> 4
            out_FD *= wide_G2D[:, 0][groups_F]
            out_FD += wide_G2D[:, 1][groups_F]


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float16(), Int8(), Int4())}


def _step_and_base(
    low_GD: NDArray[np.float32], high_GD: NDArray[np.float32]
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Return float16 steps and bases, the smallest steps whose levels -8 to 7 around the base reach low and high."""
    _check_float16_range(max(float(high_GD.max()), -float(low_GD.min())))
    base_GD = (low_GD + (high_GD - low_GD) * np.float32(8 / 15)).astype(np.float16)
    wide_GD = base_GD.astype(np.float32)
    # From the rounded base, and rounded up: codes then need no clipping, and no error exceeds half a step.
    exact_GD = np.maximum((high_GD - wide_GD) / np.float32(7), (wide_GD - low_GD) / np.float32(8))
    step_GD = exact_GD.astype(np.float16)
    return np.where(step_GD < exact_GD, np.nextafter(step_GD, np.float16(np.inf)), step_GD), base_GD


def _check_float16_range(peak: float) -> None:
    if peak > _FLOAT16_MAX:
        raise RetortError(f"hidden states reach {peak:.3g}, the largest float16 is 65504; use --codec int8")


def _float32(values: Array) -> Array:
    """Convert to float32, the one operation here whose name differs between numpy and torch."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()


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
    def of(cls, codec: Codec, hidden_LFD: NDArray[np.float32], codes_LFW: Codes, scale: Scale | None) -> "CodecError":
        """Measure the error of one whole pack, decoded layer by layer to save memory."""
        lost = []
        for layer in range(len(hidden_LFD)):
            one = slice(layer, layer + 1)
            decoded_1FD = codec.decode(codes_LFW[one], None if scale is None else scale[one])
            lost.append(cls.between(hidden_LFD[one], decoded_1FD))
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
        lost_LFD = other_LFD - hidden_LFD
        return cls(_energy(lost_LFD), _energy(hidden_LFD), np.abs(lost_LFD).max((1, 2), initial=0.0).astype(np.float64))

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
