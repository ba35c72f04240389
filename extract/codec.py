"""How hidden states become bytes: float16, or int8 with one scale a pack, layer and feature.

A codec is a pair of pure functions over one pack. Shapes: L layers, F frames, D features.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from extract.errors import RetortError

Codes = NDArray[np.int8] | NDArray[np.float16]


class Codec(Protocol):
    """What every codec offers; `scaled` says whether it stores a scale a pack, layer and feature."""

    dtype: str
    scaled: bool

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, NDArray[np.float32] | None]: ...

    def nbytes(self, num_layers: int, num_frames: int, dim: int) -> int:
        """Bytes of the codes and the scale of one pack."""
        ...


class Float16:
    """Two bytes a value, relative error <= 2^-11 within float16's range."""

    dtype = "float16"
    scaled = False

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, None]:
        """float32 (L, F, D) -> float16 (L, F, D). Raises RetortError beyond float16's range."""
        if (peak := float(np.abs(hidden_LFD).max(initial=0.0))) > float(np.finfo(np.float16).max):
            raise RetortError(f"hidden states reach {peak:.3g}, float16 ends at 65504; use --codec int8")
        return hidden_LFD.astype(np.float16), None

    def nbytes(self, num_layers: int, num_frames: int, dim: int) -> int:
        return 2 * num_layers * num_frames * dim


class Int8:
    """One byte a value: code = round(value / scale), scale = max abs / 127 over the pack, by layer and feature."""

    dtype = "int8"
    scaled = True

    def encode(self, hidden_LFD: NDArray[np.float32]) -> tuple[Codes, NDArray[np.float32]]:
        """float32 (L, F, D) -> int8 (L, F, D) and float32 (L, D)."""
        scale_LD = np.abs(hidden_LFD).max(axis=1) / np.float32(127)
        divisor_LD = np.where(scale_LD > 0, scale_LD, np.float32(1))
        codes_LFD = np.rint(hidden_LFD / divisor_LD[:, None]).astype(np.int8)
        return codes_LFD, scale_LD.astype(np.float32)

    def nbytes(self, num_layers: int, num_frames: int, dim: int) -> int:
        return num_layers * (num_frames + 4) * dim


CODECS: dict[str, Codec] = {"float16": Float16(), "int8": Int8()}


def decode(codes_LFD: Codes, scale_LD: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Codes (L, F, D) and, if the codec has one, the scale (L, D) -> float32 (L, F, D)."""
    hidden_LFD = codes_LFD.astype(np.float32)
    return hidden_LFD if scale_LD is None else hidden_LFD * scale_LD[:, None]


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
    def of(cls, hidden_LFD: NDArray[np.float32], codes: Codes, scale: NDArray[np.float32] | None) -> "CodecError":
        lost_LFD = decode(codes, scale)
        lost_LFD -= hidden_LFD
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

    def by_layer(self, layers: tuple[int, ...]) -> dict[str, dict[str, Any]]:
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
    return np.array([np.dot(layer.ravel(), layer.ravel()) for layer in values_LFD], dtype=np.float64)
