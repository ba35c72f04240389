"""The feature store, read: numpy and zarr alone, no torch.

    ROOT/<upstream>-<fingerprint>/<corpus>-<digest>/        a Zarr v3 group
        hidden   (packs, layers, frames, width) the codec's codes, chunk (1, 1, frames, width)
                                                float16 | int8 with width dim; int4 as int8 with width dim / 2
        scale    (packs, layers, ...)           what int8 (dim,) and int4 (groups, 2, dim) need beside their codes
        stem     (packs, frames, width)         the convolution stem's output, when kept: coded like a layer,
        stem_scale (packs, ...)                 with scales of its own
        pooled   (utterances, layers, dim)      float32, mean over the utterance's own frames
        index/pack, first_frame, num_frames     int32 (utterances,), corpus order; pack -1 = dropped
        index/ids                               uint8, the ids in UTF-8 joined by newlines
        shards/NNNNN.json                       one finished shard: its objects' sizes and digests
        manifest.json                           written last

`python -m extract info M.json` prints what a manifest says; `python -m extract verify M.json` checks every byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.codec import CODECS, Codes, Scale
from extract.store.location import CachedLocation, Expected, LocalLocation, Location, check_bytes
from extract.store.manifest import FORMAT_VERSION, KEEP, KEEP_DEFAULT, Manifest, check_keep
from extract.store.packing import group_by_pack

__all__ = ["FORMAT_VERSION", "KEEP", "KEEP_DEFAULT", "Manifest", "StoreReader", "check_keep", "check_sizes"]

MANIFEST_NAME = "manifest.json"


def record_name(shard: int) -> str:
    """The object that says that a shard is finished."""
    return f"shards/{shard:05d}.json"


def check_sizes(objects: Mapping[str, Expected], location: Location | CachedLocation, *, source: object) -> None:
    """Raises RetortError, which names the `source`, unless all `objects` are at `location` with their sizes."""
    found = {name: location.size(name) for name in objects}
    if not any(found.values()):
        raise RetortError(
            f"the store of {source} is gone: nothing lies at {location}; run `python -m extract run` again"
        )
    for name, (size, _) in objects.items():
        if found[name] != size:
            raise RetortError(
                f"the store of {source} is damaged: {location}/{name} has "
                f"{'no file' if found[name] is None else f'{found[name]} bytes'}, "
                f"expected {size} bytes; `python -m extract run` repairs it"
            )


@dataclass(frozen=True)
class Pack:
    """One pack as stored. Rows [first_frame, first_frame + num_frames) of utterance j are its frames.

    Rows past the last utterance are 0; those of int4 that share a group with it decode to about 0.
    """

    codes_LFW: Codes  # (layers, pack_frames, the codec's width)
    scale: Scale | None  # (layers, ...) in the codec's shape
    utterances: NDArray[np.int64]  # corpus indices, in order of first frame
    first_frame: NDArray[np.int64]
    num_frames: NDArray[np.int64]


class StoreReader:
    """Reads a finished store. Safe to open in every process; holds no file open."""

    def __init__(self, manifest: Manifest, *, source: Path) -> None:
        self.manifest = manifest
        self.source = source
        self.fingerprint = manifest.fingerprint
        self.digest = manifest.digest
        self.layers = manifest.layers
        self.dim = manifest.dim
        self.hop_samples = manifest.hop_samples
        self.receptive_samples = manifest.receptive_samples
        self.codec = CODECS[manifest.codec]
        self.keep = frozenset(manifest.keep)
        self.num_packs: int = manifest.plan["num_packs"]
        self.pack_frames: int = manifest.plan["pack_frames"]
        self.num_utterances: int = manifest.corpus["num_utterances"]
        # `rows/` is the writer's: what no reader asks for need be neither looked for nor fetched.
        self._objects = {name: expected for name, expected in manifest.objects.items() if not name.startswith("rows/")}
        self._location = manifest.location.cached(manifest.digest, self._objects)

    @classmethod
    def open(cls, manifest: Path | str, corpus: Corpus | None = None) -> "StoreReader":
        """Open the store of a manifest and check that it is there, whole in size, and of `corpus` if one is given.

        Raises RetortError for a store that is gone, incomplete, damaged in size, or of another corpus.
        """
        path = Path(manifest)
        reader = cls(Manifest.read(path), source=path)
        check_sizes(reader._objects, reader._location, source=path)
        if corpus is not None and corpus.digest != reader.manifest.corpus["digest"]:
            raise RetortError(
                f"{path} describes features of corpus {reader.manifest.corpus['name']} "
                f"({reader.manifest.corpus['digest'][:12]}), not of {corpus.name} ({corpus.digest[:12]}); "
                "give the corpus it was made from or run `python -m extract run` on this one"
            )
        return reader

    def damaged(self) -> list[str]:
        """Names of the objects whose bytes, where they lie, do not match the manifest (reads every byte)."""
        location = self.manifest.location
        return [
            name
            for name, (size, digest) in self.manifest.objects.items()
            if location.size(name) != size or location.sha256(name) != digest
        ]

    @cached_property
    def _group(self) -> zarr.Group:
        self._check_small_objects()
        return zarr.open_group(self._location.zarr_store(), mode="r")

    def _check_small_objects(self) -> None:
        """What says where everything lies is compared byte for byte; the rest is by size, and by `extract verify`."""
        if not isinstance(self._location, LocalLocation):
            return  # the cache checks what it fetches
        for name, expected in self._objects.items():
            if name.endswith("zarr.json") or name.startswith("index/"):
                check_bytes(self._location.folder / name, expected, what=f"the store of {self.source}: {name}")

    def _array(self, name: str, dtype: str, *shape: int | None) -> zarr.Array[Any]:
        """An array of the group. Raises RetortError unless it is what the manifest says; None is any number."""
        array = self._group.get(name)
        if not isinstance(array, zarr.Array) or array.dtype != dtype or not _agree(array.shape, shape):
            found = f"{array.dtype} {array.shape}" if isinstance(array, zarr.Array) else "nothing"
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise RetortError(
                f"the store of {self.source}: {name} at {self._location} is {found}, the manifest says {dtype} "
                f"({expected}); run `python -m extract run` again"
            )
        return array

    def _read(self, array: zarr.Array[Any], *where: "int | slice") -> NDArray[Any]:
        """A part of an array. Raises RetortError where the bytes are no shard of it."""
        try:
            return np.asarray(array[where])
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RetortError):
                raise
            raise RetortError(
                f"the store of {self.source} is damaged: {array.path} can't be read ({error}); `python -m extract "
                f"verify {self.source}` names what is damaged, `python -m extract run` then makes it again"
            ) from None

    @cached_property
    def _hidden(self) -> zarr.Array[Any]:
        if "frames" not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no frames; extract with --keep frames,pooled"
            )
        width = self.codec.width(self.dim)
        return self._array("hidden", self.codec.dtype, self.num_packs, len(self.layers), self.pack_frames, width)

    @cached_property
    def _scale(self) -> "zarr.Array[Any] | None":
        shape = self.codec.scale_shape(self.pack_frames, self.dim)
        if shape is None or self.codec.scale_dtype is None:
            return None
        return self._array("scale", self.codec.scale_dtype, self.num_packs, len(self.layers), *shape)

    @cached_property
    def _pooled(self) -> zarr.Array[Any]:
        if "pooled" not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no pooled; extract with --keep frames,pooled"
            )
        return self._array("pooled", "float32", self.num_utterances, len(self.layers), self.dim)

    @cached_property
    def _stem(self) -> zarr.Array[Any]:
        if "stem" not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no stem; extract with "
                "--keep frames,pooled,stem"
            )
        return self._array("stem", self.codec.dtype, self.num_packs, self.pack_frames, None)

    @cached_property
    def _stem_scale(self) -> "zarr.Array[Any] | None":
        shape = self.codec.scale_shape(self.pack_frames, self.stem_dim)
        if shape is None or self.codec.scale_dtype is None:
            return None
        return self._array("stem_scale", self.codec.scale_dtype, self.num_packs, *shape)

    @property
    def stem_dim(self) -> int:
        """Channels of the stored stem. Raises RetortError for a store without."""
        return int(self._stem.shape[-1]) * self.codec.values_per_code

    @cached_property
    def ids(self) -> list[str]:
        """Utterance ids in corpus order."""
        return bytes(self._read(self._array("index/ids", "uint8", None), slice(None))).decode().split("\n")

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def _column(self, name: str) -> NDArray[np.int64]:
        return self._read(self._array(f"index/{name}", "int32", self.num_utterances), slice(None)).astype(np.int64)

    @cached_property
    def pack_of(self) -> NDArray[np.int64]:
        """The pack of every utterance, int64 (utterances,); -1 for a dropped one."""
        return self._column("pack")

    @cached_property
    def first_frame(self) -> NDArray[np.int64]:
        """The first row of every utterance in its pack, int64 (utterances,)."""
        return self._column("first_frame")

    @cached_property
    def num_frames(self) -> NDArray[np.int64]:
        """Frames of every utterance, int64 (utterances,)."""
        return self._column("num_frames")

    @cached_property
    def _by_pack(self) -> list[NDArray[np.int64]]:
        return group_by_pack(self.pack_of, self.first_frame, self.num_packs)

    def utterances_of(self, pack: int) -> NDArray[np.int64]:
        """Corpus indices of a pack's utterances, in order of first frame."""
        return self._by_pack[pack]

    def _rows(self, layers: Sequence[int] | None) -> "slice | list[int]":
        if layers is None:
            return slice(None)
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise RetortError(f"{self.source} has no layer {missing[0]}; it keeps {', '.join(map(str, self.layers))}")
        rows = [self.layers.index(layer) for layer in layers]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))  # one read, into one array
        return rows

    def pack(self, index: int, layers: Sequence[int] | None = None) -> Pack:
        """One pack as stored (codes and scales), of all kept layers or of `layers` in that order."""
        utterances = self.utterances_of(index)
        return Pack(
            self._layers_of(self._hidden, index, layers),
            None if self._scale is None else self._layers_of(self._scale, index, layers),
            utterances,
            self.first_frame[utterances],
            self.num_frames[utterances],
        )

    def _layers_of(
        self, array: zarr.Array[Any], pack: int, layers: Sequence[int] | None, frames: slice | None = None
    ) -> Any:
        tail = () if frames is None else (frames,)
        rows = self._rows(layers)
        if isinstance(rows, slice):
            return self._read(array, pack, rows, *tail)
        return np.stack([self._read(array, pack, row, *tail) for row in rows])

    def hidden(self, utterance_id: str, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Hidden states of one utterance, float32 (layers, frames, dim). Raises RetortError for an unknown id."""
        if utterance_id not in self._index_of:
            raise RetortError(f"{self.source} has no utterance {utterance_id!r}")
        return self.hidden_at(self._index_of[utterance_id], layers)

    def stem_pack(self, index: int) -> tuple[Codes, Scale | None]:
        """The stem's output of one pack as stored: codes (1, pack_frames, width) and scale (1, ...), as of a layer."""
        scale = None if self._stem_scale is None else self._read(self._stem_scale, index)[None]
        return self._read(self._stem, index)[None], scale

    def stem_at(self, index: int) -> NDArray[np.float32]:
        """The stem's output for the utterance at a corpus index, float32 (frames, channels)."""
        pack, first, count = self._span_of(index)
        codes_1FW = self._read(self._stem, pack, slice(first, first + count))[None]
        scale = None if self._stem_scale is None else self._read(self._stem_scale, pack)[None]
        stem_FC: NDArray[np.float32] = self.codec.decode(codes_1FW, scale, first_frame=first)[0]
        return stem_FC

    def _span_of(self, index: int) -> tuple[int, int, int]:
        """The pack of the utterance at a corpus index, its first row there and its number of frames."""
        pack = int(self.pack_of[index])
        if pack < 0:
            raise RetortError(
                f"utterance {self.ids[index]!r} was dropped from {self.source} (longer than a pack or shorter than a "
                "frame)"
            )
        return pack, int(self.first_frame[index]), int(self.num_frames[index])

    def hidden_at(self, index: int, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Hidden states of the utterance at a corpus index, float32 (layers, frames, dim)."""
        pack, first, count = self._span_of(index)
        codes = self._layers_of(self._hidden, pack, layers, slice(first, first + count))
        scale = None if self._scale is None else self._layers_of(self._scale, pack, layers)
        return self.codec.decode(codes, scale, first_frame=first)

    def own_frames(self, index: int, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """One pack decoded, without its padding, its utterances end to end: float32 (layers, frames, dim)."""
        pack = self.pack(index, layers)
        own = [slice(first, first + count) for first, count in zip(pack.first_frame, pack.num_frames, strict=True)]
        hidden = self.codec.decode(pack.codes_LFW, pack.scale)
        return np.concatenate([hidden[:, rows] for rows in own], axis=1)

    def pooled(
        self, indices: NDArray[np.int64] | None = None, layers: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Time means of utterances (all, or those at `indices`), float32 (utterances, layers, dim)."""
        values: NDArray[np.float32] = self._read(self._pooled, slice(None))
        if indices is not None:
            values = values[indices]
        return values[:, self._rows(layers)]


def _agree(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size in (found, None) for found, size in zip(shape, expected, strict=True)
    )
