"""Codec `transform:RATE`: layers predicted from one another, a KLT over features, a DCT over time, RATE bits a value.

    transform:1     an eighth of int8's bytes, transform:0.5 a sixteenth

A block has T = 16 consecutive frames of one utterance, of all layers. Encoding it, layer after layer from below:

    1. subtract the layer's mean, transform each feature along the block by the orthonormal DCT-II, and subtract what a
       linear map predicts from the decoded layer below;
    2. project onto K of the D eigenvectors of the rest's covariance (KLT): T K coefficients;
    3. divide each coefficient by its deviation, and by the block's gain of its band: band 0 is row 0 of the DCT, the
       mean over the block; band 1 is the other rows. Hidden states have loud frames, which would otherwise set the
       levels of all;
    4. code each by a scalar quantiser of 0 to 8 bits. The bits are fixed for a store (reverse water-filling over all
       layers, whose errors count in units of the layer's variance), so that all blocks have the same bytes and any of
       them can be read alone.

The parameters of all steps are fitted to a sample of each store (`extract.store.transform_fit`) and stored beside the
codes. Decoding is a table look-up and three matrix products a layer. A layer is decoded after those below it. numpy and
torch, and a slice and the whole, agree within the rounding of those products, not bit for bit as other codecs do.

A row of codes is one block: the bytes of layer 0, then those of layer 1, and so on (`extract.store.transform_layer`).
It has 2 RATE D L bytes; the last ones are 0 if the layers need fewer.

Shapes: L layers, F frames, B blocks, T = 16, D features, K directions, N coefficients with bits, W bytes of a block,
E = 2 bands, G = 16 gains, Q numbers of bits (0 to 8), V levels.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from extract.base.errors import RetortError
from extract.store.codec import Array, Codec, Parameters
from extract.store.transform_layer import BLOCK_FRAMES, MOST_BITS, NUM_BANDS, NUM_GAINS, Layer, section_bytes

MOST_RATE = 4  # bits a value: above it levels are wasted, int4 and int8 lose less
_STEM_RATE = 4  # bits of the stem's values for one bit of the others: a student's input costs more than its targets

_CACHED_BLOCKS = 128  # of one layer at a time in numpy: the fewest at which matrix products are fast
_SHAPES = {
    "mean": "LD",
    "prediction": "LDD",  # of the spectrum from that of the layer below; zeros for the first layer
    "basis": "LKD",
    "bits": "LTK",
    "deviation": "LTK",
    "gains": "LEG",
    "levels": "LQV",
}
_DTYPES = {name: "uint8" if name == "bits" else "float32" for name in _SHAPES}


class Transform(Codec):
    """Codec `transform:RATE`, without parameters (sizes are known) or with those of the layers that a store has."""

    dtype: ClassVar[str] = "uint8"
    block_frames: ClassVar[int] = BLOCK_FRAMES
    cached_frames: ClassVar[int] = _CACHED_BLOCKS * BLOCK_FRAMES
    joins_layers: ClassVar[bool] = True
    needs_fit: ClassVar[bool] = True

    def __init__(self, rate: float, parameters: Parameters | None = None, places: tuple[int, ...] = ()) -> None:
        if not 0 < rate <= MOST_RATE:
            raise RetortError(
                f"codec transform:{rate:g}: expected a rate above 0 and up to {MOST_RATE} bits a value; use int4 or "
                "int8 for more"
            )
        self.name = f"transform:{rate:g}"
        self.rate = rate
        self.parameters = parameters
        self.places = places  # on the axis of layers, of those that are decoded
        self._arranged: dict[tuple[int, Any], Layer] = {}  # by layer, and by device
        self._selected: dict[tuple[int, ...], Transform] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Transform, (self.rate, self.parameters, self.places)  # without tensors of a device

    @property
    def of_stem(self) -> "Transform":
        return Transform(min(_STEM_RATE * self.rate, MOST_RATE))

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

    def codes_shape(self, num_layers: int, num_frames: int, dim: int) -> tuple[int, int, int]:
        stored = num_layers if self.parameters is None else len(self.parameters["mean"])
        return 1, self.num_rows(num_frames), stored * self.width(dim)

    def values_shape(self, codes_shape: Sequence[int], num_frames: int) -> tuple[int, int, int]:
        assert self.parameters is not None
        return len(self.places), num_frames, self.parameters["mean"].shape[1]

    def parameter_bytes(self, num_layers: int, dim: int) -> int:
        kept = min(dim, 8 * num_layers * self.width(dim))  # directions: each has a bit at least
        sizes = {"L": num_layers, "K": kept, "D": dim, "T": BLOCK_FRAMES, "E": NUM_BANDS, "G": NUM_GAINS}
        sizes |= {"Q": MOST_BITS + 1, "V": 1 << MOST_BITS}
        return sum(
            math.prod(sizes[axis] for axis in axes) * np.dtype(_DTYPES[name]).itemsize for name, axes in _SHAPES.items()
        )

    def span(self, scale: Array | None, first_frame: int, num_frames: int) -> tuple[Array | None, int]:
        return None, first_frame % BLOCK_FRAMES

    def of_layers(self, places: Sequence[int]) -> "Transform":
        chosen = tuple(self.places[place] for place in places)
        if chosen == self.places:
            return self
        if chosen not in self._selected:
            self._selected[chosen] = Transform(self.rate, self.parameters, chosen)
            self._selected[chosen]._arranged = self._arranged  # with what was moved to a device
        return self._selected[chosen]

    def encode_into(self, codes_LRW: Array, scale: Array | None, hidden_LFD: Array) -> None:
        layers = self._layers(hidden_LFD)
        codes_LRW[..., sum(layer.num_bytes for layer in layers) :] = 0
        for blocks in _parts(codes_LRW[0]):
            frames, start, below_BTD = _frames_of(blocks), 0, None
            for layer, hidden_FD in zip(layers, hidden_LFD, strict=True):
                codes_BW = codes_LRW[0, blocks, start : start + layer.num_bytes]
                below_BTD = layer.encode(codes_BW, hidden_FD[frames], below_BTD, is_last=layer is layers[-1])
                start += layer.num_bytes

    def decode_into(self, out_LFD: Array, codes_LRW: Array, scale: Array | None, rows_F: Array) -> None:
        layers = self._layers(out_LFD)[: max(self.places) + 1]
        parts = _parts(codes_LRW[0])
        for blocks in parts:
            frames, start, below_BTD = _frames_of(blocks), 0, None
            own: Any = slice(None)  # of one part: without a step that waits for a GPU
            if len(parts) > 1:
                own = np.flatnonzero((rows_F >= frames.start) & (rows_F < frames.stop))
            for place, layer in enumerate(layers):
                codes_BW = codes_LRW[0, blocks, start : start + layer.num_bytes]
                below_BTD = layer.decode(codes_BW, below_BTD)
                start += layer.num_bytes
                for at in [at for at, chosen in enumerate(self.places) if chosen == place]:
                    out_LFD[at, own] = layer.frames(below_BTD)[rows_F[own] - frames.start]

    def _layers(self, like: Array) -> list[Layer]:
        """Return the parameters of all layers beside an array; they are moved to a device once."""
        assert self.parameters is not None, f"{self.name} has no parameters"
        device, found = None if isinstance(like, np.ndarray) else like.device, list[Layer]()
        for place in range(len(self.parameters["mean"])):
            if (place, device) not in self._arranged:
                one = {name: values[place] for name, values in self.parameters.items()}
                self._arranged[place, device] = Layer.of(one, found[-1] if found else None).beside(like)
            found.append(self._arranged[place, device])
        return found

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
        return Transform(self.rate, parameters, tuple(range(len(parameters["mean"]))))

    def _check_values(self, parameters: Parameters) -> None:
        bits = parameters["bits"]
        num_layers, dim = parameters["mean"].shape
        most = num_layers * self.width(dim)
        if (bits > MOST_BITS).any() or not bits.any((1, 2)).all() or sum(map(section_bytes, bits)) > most:
            raise self._refused(
                "bits", f"expected some in each layer, {most} bytes at most a block, {MOST_BITS} bits a coefficient"
            )
        if (parameters["deviation"][bits > 0] <= 0).any():
            raise self._refused("deviation", "expected more than 0 for every coefficient with bits")
        if (parameters["gains"] <= 0).any() or (np.diff(parameters["gains"]) < 0).any():
            raise self._refused("gains", "expected ascending numbers above 0")
        for number in range(1, MOST_BITS + 1):
            if (np.diff(parameters["levels"][:, number, : 1 << number]) < 0).any():
                raise self._refused("levels", f"expected ascending levels of {number} bits")

    def _refused(self, name: str, reason: str) -> RetortError:
        return RetortError(f"parameters of codec {self.name}: {name}: {reason}")


def _parts(codes_BW: Array) -> list[slice]:
    """Return the rows of blocks: in numpy parts that fit in the cache, in torch one part."""
    size = _CACHED_BLOCKS if isinstance(codes_BW, np.ndarray) else max(1, len(codes_BW))
    return [slice(first, min(first + size, len(codes_BW))) for first in range(0, len(codes_BW), size)]


def _frames_of(blocks: slice) -> slice:
    return slice(blocks.start * BLOCK_FRAMES, blocks.stop * BLOCK_FRAMES)
