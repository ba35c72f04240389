"""Files of an array's shards, written and read directly: Zarr v3's `sharding_indexed` without compressors.

A file holds the chunks of a grid (packs, layers) end to end in Morton order, then its index, then the index's crc32c.
The index has two uint64 for each chunk, its offset and its bytes, both 2^64 - 1 for a chunk of zeros, which is left
out. All numbers are little-endian. A shard of zeros has no file. int8's scales, which are small, are one chunk per
shard in C order, without an index; their packs past the last one are 0.

zarr-python writes and reads the same bytes, but copies each value several times. Training reads here into memory of its
own, such as pinned memory. Every read opens and closes its file, so threads and forked processes share no position.

Shapes: P packs, L layers, F rows of a chunk.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from extract.base.files import read_at, write_parts

_ABSENT = np.uint64(2**64 - 1)  # in an index: offset and bytes of a chunk of zeros
_NOWHERE = -1  # the same among offsets
_KEPT_INDEXES = 1024  # of one array: 7 MB for shards of 16 packs and 25 layers
_LOOKED_AT = 4096  # bytes of a chunk that are nearly never all 0


class DamagedShard(Exception):
    """Error of a file that does not hold the shard that is read from it; its text is the reason."""


def morton_order(grid: tuple[int, int]) -> NDArray[np.int64]:
    """Return the places (pack, layer) of a grid's chunks in the order of their bytes, int64 (P L, 2).

    The place's number in this order has the bits of pack and layer in turn, lowest first, as long as an axis has bits.
    """
    places = np.indices(grid, dtype=np.int64).reshape(2, -1)
    widths = [(size - 1).bit_length() for size in grid]
    codes, position = np.zeros(places.shape[1], dtype=np.int64), 0
    for bit in range(max(widths)):
        for axis, width in zip(places, widths, strict=True):
            if bit < width:
                codes |= (axis >> bit & 1) << position
                position += 1
    return places[:, np.argsort(codes)].T


def write_indexed(path: Path, packs: Sequence[NDArray[Any]], *, grid: tuple[int, int]) -> list[Any] | None:
    """Write a shard's packs, which may be fewer than the grid's; return [bytes, sha256], None for a shard of zeros.

    packs: of one shape, (L, ...) or without an axis of layers, C-contiguous: then no byte of them is copied.
    """
    chunks_PL = [_layers(pack, grid[1]) for pack in packs]
    num_bytes = chunks_PL[0][0].nbytes
    index_PL2 = np.full((*grid, 2), _ABSENT, dtype="<u8")
    kept: list[NDArray[np.uint8]] = []
    for pack, layer in morton_order(grid).tolist():
        if pack < len(packs) and _has_bits(chunk := chunks_PL[pack][layer]):
            index_PL2[pack, layer] = len(kept) * num_bytes, num_bytes
            kept.append(chunk)
    index = index_PL2.tobytes()
    return _write(path, [*kept, index, _checksum(index)] if kept else [])


def write_whole(path: Path, packs: Sequence[NDArray[Any]], *, num_packs: int) -> list[Any] | None:
    """Write a shard of one chunk for `num_packs` packs; return [bytes, sha256], None for zeros."""
    whole = np.zeros((num_packs, *packs[0].shape), dtype=packs[0].dtype)
    whole[: len(packs)] = packs
    return _write(path, [_layers(whole, 1)[0]] if _has_bits(_layers(whole, 1)[0]) else [])


def _write(path: Path, parts: list[Any]) -> list[Any] | None:
    if not parts:
        path.unlink(missing_ok=True)  # a killed or damaged one of other values
        return None
    return write_parts(path, parts)


def _layers(pack: NDArray[Any], num_layers: int) -> NDArray[np.uint8]:
    """Return the bytes of a pack by layer, uint8 (L, bytes); a view of contiguous memory."""
    return np.ascontiguousarray(pack).reshape(num_layers, -1).view(np.uint8)


def _has_bits(chunk: NDArray[np.uint8]) -> bool:
    """Return True unless all bytes are 0: -0.0 is not the fill value."""
    return bool(chunk[:_LOOKED_AT].any() or chunk.any())


def _checksum(index: bytes) -> bytes:
    return int(google_crc32c.value(index)).to_bytes(4, "little")


@dataclass(frozen=True)
class ShardedArray:
    """Reader of an array of shards, (packs, layers, F, ...) or (packs, F, ...) without an axis of layers."""

    name: str
    shard_packs: int
    layers: tuple[int, ...]  # shape of the axis of layers, empty without one
    shape: tuple[int, ...]  # of a chunk: one pack and layer
    dtype: np.dtype[Any]
    indexed: bool  # False: a shard is one chunk
    file_of: Callable[[str], "Path | None"]  # name of an object -> its file, None for a shard of zeros

    @classmethod
    def of(cls, array: "zarr.Array[Any]", *, has_layers: bool, file_of: Callable[[str], "Path | None"]) -> Self:
        """Take the layout from zarr's metadata. Raises DamagedShard for one that no version of Retort writes."""
        axes = 1 + has_layers  # before those of a chunk
        whole = array.shards or array.chunks
        inner = (1,) * axes + array.shape[axes:] if array.shards else whole
        if whole[1:] != array.shape[1:] or array.chunks != inner or array.compressors or array.filters:
            raise DamagedShard(f"chunks of {array.chunks} in shards of {array.shards}, expected uncompressed packs")
        shape = array.shape[axes:]
        return cls(array.path, whole[0], array.shape[1:axes], shape, array.dtype, array.shards is not None, file_of)

    @property
    def grid(self) -> tuple[int, int]:
        return self.shard_packs, self.layers[0] if self.layers else 1

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(
        self, pack: int, layers: Sequence[int] = (0,), rows: slice = slice(None), out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Read rows of a pack's layers, (layers, rows, ...), into `out` if given, C-contiguous of that shape.

        layers: places on the axis of layers. Raises DamagedShard if the file is not that of a shard.
        """
        start, stop, step = rows.indices(self.shape[0])
        shape = (len(layers), max(0, stop - start), *self.shape[1:])
        if out is None:
            out = np.empty(shape, dtype=self.dtype)
        assert step == 1 and out.shape == shape and out.dtype == self.dtype and out.flags.c_contiguous
        shard, place = divmod(pack, self.shard_packs)
        if (file := self._file(shard)) is None:
            out[:] = 0
            return out
        offsets_L = self._offsets(shard)[place]
        before = start * (self.chunk_bytes // self.shape[0])
        with _opened(file) as descriptor:
            for values, offset in zip(_layers(out, len(layers)), offsets_L[list(layers)].tolist(), strict=True):
                if offset == _NOWHERE:
                    values[:] = 0
                else:
                    _read_all(descriptor, values, offset + before)
        return out

    def _file(self, shard: int) -> "Path | None":
        return self.file_of(f"{self.name}/c/{shard}" + "/0" * len(self.layers + self.shape))

    @cached_property
    def _offsets(self) -> Callable[[int], NDArray[np.int64]]:
        """Offsets of a shard's chunks, int64 (P, L), which are kept for the shards that were read last."""
        return lru_cache(_KEPT_INDEXES)(self._read_offsets)

    def _read_offsets(self, shard: int) -> NDArray[np.int64]:
        num_chunks = int(np.prod(self.grid))
        if not self.indexed:
            return (np.arange(num_chunks) * self.chunk_bytes).reshape(self.grid)
        file = self._file(shard)
        assert file is not None
        data = np.empty(16 * num_chunks + 4, dtype=np.uint8)
        with _opened(file) as descriptor:
            if (end := os.fstat(descriptor).st_size - len(data)) < 0:
                raise DamagedShard(f"{file.name}: its index has {len(data)} bytes, the file fewer")
            _read_all(descriptor, data, end)
        if data[-4:].tobytes() != _checksum(data[:-4].tobytes()):
            raise DamagedShard("the checksum of a shard's index differs")
        index_PL2 = data[:-4].view("<u8").reshape(*self.grid, 2)
        absent_PL = index_PL2[..., 0] == _ABSENT
        offset, num_bytes = index_PL2[~absent_PL].T
        if (num_bytes != self.chunk_bytes).any() or (offset > end).any():
            raise DamagedShard(f"a shard's index has chunks that are not of {self.chunk_bytes} bytes before it")
        return np.where(absent_PL, np.int64(_NOWHERE), index_PL2[..., 0].astype(np.int64))


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        raise DamagedShard(f"{file} is gone") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, into: NDArray[np.uint8], offset: int) -> None:
    if missing := read_at(descriptor, into.data, offset):
        raise DamagedShard(f"the file ends {missing} bytes too early")
