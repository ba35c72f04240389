"""How hidden states become bytes, and bytes hidden states again: float16, int8 and int4.

    float16   2 bytes a value
    int8      1 byte, and a scale a pack, layer and feature
    int4      half a byte, and a step and a base every 32 frames of a layer and feature: 0.625 bytes

A codec works on one pack or on some frames of one. Decoding is written once, with the operators that numpy arrays and
torch tensors share, so that a reader without torch and a training device compute the same bits.

Shapes: L layers, F frames, D features, W codes a frame, G groups of consecutive frames. Functions of a frame's place
in its pack take `rows_F`, the frames' rows counted from the pack's first.
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
Array = Any  # a numpy array or a torch tensor; both of a call are of one kind

_BLOCK_FRAMES = 256
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_FLOAT32_TINY = np.finfo(np.float32).tiny  # the smallest normal number


class Codec(ABC):
    """What every codec offers. One without a scale has `scale_dtype` None."""

    name: ClassVar[str]
    dtype: ClassVar[str]  # of the codes
    scale_dtype: ClassVar[str | None] = None
    values_per_code: ClassVar[int] = 1

    def width(self, dim: int) -> int:
        """Codes of one frame and layer, W. Raises RetortError for a dim that the codec can't hold."""
        if dim % self.values_per_code:
            raise RetortError(
                f"codec {self.name} stores {self.values_per_code} features in a code and needs a dim that divides by "
                f"{self.values_per_code}, got {dim}; use --codec int8"
            )
        return dim // self.values_per_code

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...] | None:
        """Shape of the scale of one layer of a pack, None without one."""
        return None

    def nbytes(self, num_layers: int, num_frames: int, dim: int) -> int:
        """Bytes of the codes and the scale of one pack."""
        size = num_frames * self.width(dim) * np.dtype(self.dtype).itemsize
        if (shape := self.scale_shape(num_frames, dim)) is not None:
            size += int(np.prod(shape)) * np.dtype(self.scale_dtype).itemsize
        return num_layers * size

    @abstractmethod
    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale | None]:
        """One pack, float32 (L, F, D) -> codes (L, F, W) and scale (L, ...). Raises RetortError beyond the range."""

    @abstractmethod
    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        """Fill float32 (L, F, D) with what the codes mean. The scale is the whole pack's, or that of `span`."""

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        """The part of a pack's scale that these consecutive frames need, and the row of the first of them in it."""
        return scale, first_frame

    def decode(self, codes_LFW: Codes, scale: Scale | None, *, first_frame: int = 0) -> NDArray[np.float32]:
        """Codes of consecutive frames of a pack, from `first_frame` on, and the pack's scale -> float32 (L, F, D)."""
        num_layers, num_frames, width = codes_LFW.shape
        hidden_LFD = np.empty((num_layers, num_frames, width * self.values_per_code), dtype=np.float32)
        scale, row = self.span(scale, first_frame, num_frames)
        self.decode_into(hidden_LFD, codes_LFW, scale, np.arange(row, row + num_frames))
        return hidden_LFD


class Float16(Codec):
    """Two bytes a value, relative error <= 2^-11 within float16's range."""

    name = "float16"
    dtype = "float16"

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, None]:
        _check_float16_range(float(np.abs(hidden_LFD).max(initial=0.0)))
        return hidden_LFD.astype(np.float16), None

    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        out_LFD[...] = codes_LFW


class Int8(Codec):
    """One byte a value: code = round(value / scale), scale = max abs / 127 over the pack, by layer and feature."""

    name = "int8"
    dtype = "int8"
    scale_dtype = "float32"

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...]:
        return (dim,)

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale]:
        codes_LFD = np.empty(hidden_LFD.shape, dtype=np.int8)
        scale_LD = np.empty((len(hidden_LFD), hidden_LFD.shape[2]), dtype=np.float32)
        # Encoding runs beside the forward pass: blocks that stay in the cache take three fifths of the time.
        for hidden_FD, codes_FD, scale_D in zip(hidden_LFD, codes_LFD, scale_LD, strict=True):
            scale_D[:] = np.abs(np.maximum(hidden_FD.max(axis=0), -hidden_FD.min(axis=0))) / np.float32(127)
            # Below it a scale is too coarse to hold 127 steps, and codes would wrap: such features are 0.
            scale_D[scale_D < _FLOAT32_TINY] = 0
            divisor_D = np.where(scale_D > 0, scale_D, np.float32(1))
            for first in range(0, len(hidden_FD), _BLOCK_FRAMES):
                block_FD = hidden_FD[first : first + _BLOCK_FRAMES] / divisor_D
                codes_FD[first : first + _BLOCK_FRAMES] = np.rint(block_FD, out=block_FD)
        return codes_LFD, scale_LD

    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        assert scale is not None
        out_LFD[...] = codes_LFW
        out_LFD *= scale[:, None]


class Int4(Codec):
    """Half a byte a value: value = code * step + base, code -8 to 7, step and base by group, layer and feature.

    Hidden states move slowly against a frame, so 32 frames of a feature span a part of what the pack spans, and that
    part lies off zero: hence groups, and a base beside the step. On the demo teacher over AN4 that gives 26.5 dB where
    steps alone, which for the same 0.625 bytes can change every 16 frames, give 23.7.

    A byte holds feature d in its low and feature d + D/2 in its high half, both in two's complement. The scale of a
    layer is float16 (G, 2, D): steps, then bases. The last group of a pack may be shorter.
    """

    name = "int4"
    dtype = "int8"
    scale_dtype = "float16"
    values_per_code = 2
    group_frames: ClassVar[int] = 32

    def scale_shape(self, num_frames: int, dim: int) -> tuple[int, ...]:
        return (-(-num_frames // self.group_frames), 2, dim)

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, Scale]:
        num_layers, num_frames, dim = hidden_LFD.shape
        half, shape = self.width(dim), self.scale_shape(num_frames, dim)
        codes_LFW = np.empty((num_layers, num_frames, half), dtype=np.int8)
        scale_LG2D = np.empty((num_layers, *shape), dtype=np.float16)
        # One layer at a time in one buffer: encoding runs beside the forward pass, and fresh pages are half its cost.
        grouped_GTD = np.empty((shape[0], self.group_frames, dim), dtype=np.float32)
        values_FD = grouped_GTD.reshape(-1, dim)
        for layer, hidden_FD in enumerate(hidden_LFD):
            values_FD[:num_frames] = hidden_FD
            values_FD[num_frames:] = hidden_FD[-1]  # widens no range
            step_GD, base_GD = _step_and_base(grouped_GTD.min(axis=1), grouped_GTD.max(axis=1))
            scale_LG2D[layer, :, 0], scale_LG2D[layer, :, 1] = step_GD, base_GD
            grouped_GTD -= base_GD.astype(np.float32)[:, None]
            grouped_GTD /= np.where(step_GD > 0, step_GD, np.float16(1)).astype(np.float32)[:, None]
            np.rint(grouped_GTD, out=grouped_GTD)
            codes_FD = values_FD[:num_frames].astype(np.int8)
            codes_LFW[layer] = (codes_FD[:, half:] << 4) | (codes_FD[:, :half] & 15)
        return codes_LFW, scale_LG2D

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        assert scale is not None
        first_group, row = divmod(first_frame, self.group_frames)
        return scale[:, first_group : -(-(first_frame + num_frames) // self.group_frames)], row

    def decode_into(self, out_LFD: Array, codes_LFW: Array, scale: Array | None, rows_F: Array) -> None:
        assert scale is not None
        half, groups_F = codes_LFW.shape[-1], rows_F // self.group_frames
        # Layer by layer, so that a step and a base for every value exist of one layer only.
        for out_FD, codes_FW, scale_G2D in zip(out_LFD, codes_LFW, scale, strict=True):
            wide_G2D = _float32(scale_G2D)
            out_FD[:, :half] = (codes_FW << 4) >> 4  # int8: the shift back brings the sign
            out_FD[:, half:] = codes_FW >> 4
            out_FD *= wide_G2D[:, 0][groups_F]
            out_FD += wide_G2D[:, 1][groups_F]


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float16(), Int8(), Int4())}


def _step_and_base(
    low_GD: NDArray[np.float32], high_GD: NDArray[np.float32]
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """The smallest float16 step whose sixteen levels, -8 to 7 steps from the base, reach from low to high."""
    _check_float16_range(max(float(high_GD.max()), -float(low_GD.min())))
    base_GD = (low_GD + (high_GD - low_GD) * np.float32(8 / 15)).astype(np.float16)
    wide_GD = base_GD.astype(np.float32)
    # From the base as rounded, and itself rounded up: codes then need no clipping, nothing is off by over half a step.
    exact_GD = np.maximum((high_GD - wide_GD) / np.float32(7), (wide_GD - low_GD) / np.float32(8))
    step_GD = exact_GD.astype(np.float16)
    return np.where(step_GD < exact_GD, np.nextafter(step_GD, np.float16(np.inf)), step_GD), base_GD


def _check_float16_range(peak: float) -> None:
    if peak > _FLOAT16_MAX:
        raise RetortError(f"hidden states reach {peak:.3g}, float16 ends at 65504; use --codec int8")


def _float32(values: Array) -> Array:
    """The same values as float32: the one thing that numpy and torch call by different names."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()


@dataclass
class CodecError:
    """What a codec lost, by layer: sums over all values, so that shards add up. All float64 (L,)."""

    error: NDArray[np.float64]
    signal: NDArray[np.float64]
    max_abs: NDArray[np.float64]

    @classmethod
    def none(cls, num_layers: int) -> "CodecError":
        return cls(np.zeros(num_layers), np.zeros(num_layers), np.zeros(num_layers))

    @classmethod
    def of(cls, codec: Codec, hidden_LFD: NDArray[np.float32], codes_LFW: Codes, scale: Scale | None) -> "CodecError":
        """What the codec lost of one whole pack, decoded a layer at a time."""
        lost = []
        for layer in range(len(hidden_LFD)):
            one = slice(layer, layer + 1)
            decoded_1FD = codec.decode(codes_LFW[one], None if scale is None else scale[one])
            lost.append(cls.between(hidden_LFD[one], decoded_1FD))
        return cls.joined(lost)

    @classmethod
    def joined(cls, parts: Sequence["CodecError"]) -> "CodecError":
        """Several layers' errors as one, layer after layer."""
        return cls(
            np.concatenate([part.error for part in parts]),
            np.concatenate([part.signal for part in parts]),
            np.concatenate([part.max_abs for part in parts]),
        )

    @classmethod
    def between(cls, hidden_LFD: NDArray[np.float32], other_LFD: NDArray[np.float32]) -> "CodecError":
        """What `other` lost of `hidden`; other precisions of a forward pass are measured so, too."""
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
        """For the manifest: signal-to-noise in dB (None when nothing was lost) and the largest absolute error."""
        return {
            str(layer): {
                "snr_db": round(float(10 * np.log10(signal / error)), 2) if error > 0 and signal > 0 else None,
                "max_abs_error": float(f"{peak:.4g}"),
            }
            for layer, error, signal, peak in zip(layers, self.error, self.signal, self.max_abs, strict=True)
        }


def _energy(values_LFD: NDArray[np.float32]) -> NDArray[np.float64]:
    """The sum of squares by layer. One dot product a layer: this runs beside the forward pass and must stay small."""
    with np.errstate(over="ignore"):
        energy = np.array([np.dot(layer.ravel(), layer.ravel()) for layer in values_LFD], dtype=np.float64)
    for layer in np.flatnonzero(np.isinf(energy)):  # squares of float32 beyond 1.8e19
        energy[layer] = np.square(values_LFD[layer], dtype=np.float64).sum()
    return energy
