"""Reading a feature store, with numpy and zarr and without torch. Packs are read by `extract.store.shard_file`.

    ROOT/<upstream>-<fingerprint>/<corpus>-<digest>/        a Zarr v3 group
        hidden     (packs, layers, rows, width)    codes, one chunk per pack and layer, of float16 and int8 a row per
                                                   frame, width = dim; int4 as int8, width = dim / 2; transform:RATE
                                                   as uint8, a row per 16 frames, width = 2 x RATE x dim
        scale      (packs, layers, ...)            scales of the codes: float32 (dim,) of int8, float16
                                                   (groups, 2, dim) of int4
        stem       (packs, rows, width)            output of the convolution stem, if kept; coded like a layer
        stem_scale (packs, ...)                    its scales
        codec/hidden/NAME (layers, ...)            parameters of codec transform; of the stem: codec/stem/NAME (1, ...)
        pooled     (utterances, layers, dim)       float32, mean over the utterance's own frames; NaN if dropped
        index/pack, first_frame, num_frames        int32 (utterances,), in corpus order; pack -1 = dropped; of codec
                                                   transform first_frame is a multiple of 16
        index/ids                                  uint8, the ids in UTF-8 joined by newlines
        rows/NNNNN.npy                             the pooled rows of a shard, from which `pooled` is made
        shards/NNNNN.json                          record of a finished shard: sizes and digests of its objects
        codec.json                                 the same of the parameters in codec/
        objects.bin                                list of all objects with sizes and digests (`extract.store.objects`)
        manifest.json                              written last

`python -m extract info M.json` prints a manifest; `python -m extract verify M.json` checks every byte of its store.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from extract.base.columns import TextColumn
from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.codec import Codec, Codes, Scale
from extract.store.codecs import codec_named
from extract.store.location import LocalLocation, check_bytes, check_sizes
from extract.store.manifest import Manifest
from extract.store.objects import Expected
from extract.store.packing import PackMembers, ranges
from extract.store.parameters import read_parameters
from extract.store.shard_file import DamagedShard, ShardedArray


@dataclass(frozen=True)
class Pack:
    """One pack as stored. Utterance j has rows [first_frame[j], first_frame[j] + num_frames[j]).

    Codes of other rows are of no utterance: past the last one they are those of 0 (in int4 such rows decode to about 0
    if they share a group with it), in codec `transform` anything.
    """

    codes_LRW: Codes  # in the shape of `Codec.codes_shape`
    scale: Scale | None  # (layers, ...) in the shape of `Codec.scale_shape`
    utterances: NDArray[np.int64]  # corpus indices, in order of first frame
    first_frame: NDArray[np.int64]
    num_frames: NDArray[np.int64]
    codec: Codec  # of these layers


class StoreReader:
    """Reader of a finished store. It may be opened in any process and keeps no file open."""

    def __init__(self, manifest: Manifest, *, source: Path) -> None:
        self.manifest = manifest
        self.source = source
        self.fingerprint = manifest.fingerprint
        self.digest = manifest.digest
        self.layers = manifest.layers
        self.dim = manifest.dim
        self.hop_samples = manifest.hop_samples
        self.receptive_samples = manifest.receptive_samples
        self.codec = codec_named(manifest.codec)  # without parameters
        self.keep = frozenset(manifest.keep)
        self.num_packs: int = manifest.plan["num_packs"]
        self.pack_frames: int = manifest.plan["pack_frames"]
        self.num_utterances: int = manifest.corpus["num_utterances"]
        # No reader uses `rows/`: these objects are neither required nor fetched.
        self._objects = manifest.objects.without_rows()
        self._location = manifest.location.cached(manifest.digest, self._objects)  # the folder, or the cache of a URL

    @classmethod
    def open(cls, manifest: Path | str, corpus: Corpus | None = None) -> "StoreReader":
        """Open the store of a manifest; check the sizes of its objects, and that it is of `corpus` if one is given.

        Raises RetortError for a store that is missing, incomplete, damaged in size, or of another corpus.
        """
        path = Path(manifest)
        reader = cls(Manifest.read(path), source=path)
        check_sizes(reader._objects, reader._location, source=path)
        if corpus is not None and corpus.digest != reader.manifest.corpus["digest"]:
            raise RetortError(
                f"{path} describes features of corpus {reader.manifest.corpus['name']} "
                f"({reader.manifest.corpus['digest'][:12]}), not of {corpus.name} ({corpus.digest[:12]}); "
                "give the corpus that it was made from, or run `python -m extract run` on this one"
            )
        return reader

    def rows_of(self, corpus: Corpus) -> Corpus:
        """Return the corpus with a row for each row of the store: long utterances cut as the store's are.

        Raises RetortError if their numbers of rows differ.
        """
        corpus = corpus.cut_long(self.manifest.cut_samples)
        if len(corpus) != self.num_utterances:
            raise RetortError(
                f"{self.source}: corpus: got {self.num_utterances} as num_utterances, expected {len(corpus)} of corpus "
                f"{corpus.name}; the file was changed by hand, run `python -m extract run` again"
            )
        return corpus

    def damaged(self) -> list[str]:
        """Return the names of the objects at the store's location whose bytes differ from the list (reads all).

        Raises RetortError if the list is not that of the store's digest.
        """
        location = self.manifest.location
        if (found := self.manifest.objects.digest()) != self.digest:
            raise RetortError(
                f"{self.source}: digest {self.digest[:12]}, that of its objects is {found[:12]}; the file was changed "
                "by hand, run `python -m extract run` again"
            )
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
        """Compare metadata and index byte for byte; arrays were compared by size, and `extract verify` reads them."""
        if not isinstance(self._location, LocalLocation):
            return  # the cache checks every object that it fetches
        for name, expected in self._objects.items():
            if name.endswith("zarr.json") or name.startswith("index/"):
                self._check(name, expected)

    def _check(self, name: str, expected: Expected) -> None:
        """Compare an object byte for byte."""
        if isinstance(self._location, LocalLocation):  # the cache checks every object that it fetches
            check_bytes(self._location.folder / name, expected, what=f"the store of {self.source}: {name}")

    def _array(self, name: str, dtype: str, *shape: int | None) -> zarr.Array[Any]:
        """Return an array of the group. Raises RetortError unless it has this dtype and shape; None is any size."""
        array = self._group.get(name)
        if not isinstance(array, zarr.Array) or array.dtype != dtype or not _agree(array.shape, shape):
            found = f"{array.dtype} {array.shape}" if isinstance(array, zarr.Array) else "nothing"
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise RetortError(
                f"the store of {self.source}: {name} at {self._location} is {found}, expected {dtype} ({expected}) by "
                "the manifest; run `python -m extract run` again"
            )
        return array

    def _sharded(self, name: str, dtype: str, *shape: int | None, has_layers: bool) -> ShardedArray:
        with self._refused(name):
            return ShardedArray.of(self._array(name, dtype, *shape), has_layers=has_layers, file_of=self._file_of)

    def _file_of(self, name: str) -> Path | None:
        """Return the file of an object, fetched first if the store is at a URL; None for one that was not written."""
        return self._location.file(name) if name in self._objects else None

    @contextmanager
    def _refused(self, array: str) -> Iterator[None]:
        """Raise RetortError for bytes that are not those of a shard."""
        try:
            yield
        except (ValueError, RuntimeError, DamagedShard) as error:  # zarr's, for a chunk; ours
            if isinstance(error, RetortError):  # a ValueError, too: the cache could not fetch the object
                raise
            raise RetortError(
                f"the store of {self.source} is damaged: {array} can't be read ({error}); `python -m extract "
                f"verify {self.source}` names what is damaged, `python -m extract run` then makes it again"
            ) from None

    def _read(self, array: zarr.Array[Any], where: slice) -> NDArray[Any]:
        """Read rows of a small array."""
        with self._refused(array.path):
            return np.asarray(array[where])

    def _check_kept(self, part: str, advice: str) -> None:
        if part not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no {part}; extract with --keep {advice}"
            )

    @cached_property
    def _hidden(self) -> ShardedArray:
        self._check_kept("frames", "frames,pooled")
        num_layers, *row = self.codec.codes_shape(len(self.layers), self.pack_frames, self.dim)
        axis = () if self.codec.joins_layers else (num_layers,)
        return self._sharded("hidden", self.codec.dtype, self.num_packs, *axis, *row, has_layers=bool(axis))

    @cached_property
    def _scale(self) -> ShardedArray | None:
        return self._scale_array("scale", self.dim, len(self.layers))

    @cached_property
    def _pooled(self) -> zarr.Array[Any]:
        self._check_kept("pooled", "frames,pooled")
        return self._array("pooled", "float32", self.num_utterances, len(self.layers), self.dim)

    @cached_property
    def _stem(self) -> ShardedArray:
        self._check_kept("stem", "frames,pooled,stem")
        rows = self.codec.num_rows(self.pack_frames)
        return self._sharded("stem", self.codec.dtype, self.num_packs, rows, None, has_layers=False)

    @cached_property
    def _stem_scale(self) -> ShardedArray | None:
        return self._scale_array("stem_scale", self.stem_dim)

    def _scale_array(self, name: str, dim: int, *axes: int) -> ShardedArray | None:
        shape = self.codec.scale_shape(self.pack_frames, dim)
        if shape is None or self.codec.scale_dtype is None:
            return None
        return self._sharded(name, self.codec.scale_dtype, self.num_packs, *axes, *shape, has_layers=bool(axes))

    @property
    def stem_dim(self) -> int:
        """Channels of the stored stem. Raises RetortError for a store without one."""
        return self.codec.of_stem.dim(self._stem.shape[-1])

    @cached_property
    def ids(self) -> TextColumn:
        """Utterance ids in corpus order."""
        return TextColumn.of_lines(self._read(self._array("index/ids", "uint8", None), slice(None)))

    def _column(self, name: str) -> NDArray[np.int64]:
        return self._read(self._array(f"index/{name}", "int32", self.num_utterances), slice(None)).astype(np.int64)

    @cached_property
    def pack_of(self) -> NDArray[np.int64]:
        """Pack of every utterance, int64 (utterances,); -1 for a dropped one."""
        return self._column("pack")

    @cached_property
    def first_frame(self) -> NDArray[np.int64]:
        """First row of every utterance in its pack, int64 (utterances,)."""
        return self._column("first_frame")

    @cached_property
    def num_frames(self) -> NDArray[np.int64]:
        """Frames of every utterance, int64 (utterances,)."""
        return self._column("num_frames")

    @cached_property
    def _by_pack(self) -> PackMembers:
        return PackMembers.of(self.pack_of, self.first_frame, self.num_packs)

    def utterances_of(self, pack: int) -> NDArray[np.int64]:
        """Return the corpus indices of a pack's utterances, in order of first frame."""
        return self._by_pack[pack]

    def codec_for(self, layers: Sequence[int] | None = None) -> Codec:
        """Return the codec that decodes all stored layers, or `layers` in that order."""
        return self._hidden_codec.of_layers(self._rows(layers))

    @cached_property
    def _hidden_codec(self) -> Codec:
        return self._fitted(self.codec, "hidden", len(self.layers), self.dim)

    @cached_property
    def stem_codec(self) -> Codec:
        """The codec that decodes the codes of the stem."""
        return self._fitted(self.codec.of_stem, "stem", 1, self.stem_dim)

    def _fitted(self, codec: Codec, array: str, num_layers: int, dim: int) -> Codec:
        """Return the codec with the stored parameters for an array of codes, if it has any."""
        if not codec.needs_fit:
            return codec
        group, where = self._group, f"the store of {self.source}"
        objects = self._objects.below(f"codec/{array}")
        for name, expected in objects.items():
            self._check(name, expected)
        with self._refused(f"codec/{array}"):
            parameters = read_parameters(group, array, objects, where=where)
        try:
            return codec.fitted(parameters, (num_layers, dim))
        except RetortError as error:
            raise RetortError(f"{where}: codec/{array}: {error}; run `python -m extract run` again") from None

    def _rows(self, layers: Sequence[int] | None) -> list[int]:
        """Return the places of layers on the axis of layers. Raises RetortError for a layer that is not stored."""
        if layers is None:
            return list(range(len(self.layers)))
        if missing := [layer for layer in layers if layer not in self.layers]:
            stored = ", ".join(map(str, self.layers))
            raise RetortError(f"{self.source} has no layer {missing[0]}; expected one of {stored}")
        return [self.layers.index(layer) for layer in layers]

    def pack(
        self,
        index: int,
        layers: Sequence[int] | None = None,
        *,
        frames: slice = slice(None),
        out: Codes | None = None,
    ) -> Pack:
        """Read one pack as stored (codes and scales), of all stored layers or of `layers` in that order.

        frames: rows of the pack whose codes are read (`Codec.code_rows`); `Pack.first_frame` and the scale stay those
        of the whole pack.
        out: C-contiguous memory in the shape of the codes and of the codec's dtype, such as pinned memory, for them.
        """
        utterances = self.utterances_of(index)
        return Pack(
            self._codes(index, layers, frames, out),
            self._scale_of(index, layers),
            utterances,
            self.first_frame[utterances],
            self.num_frames[utterances],
            self.codec_for(layers),
        )

    def _codes(
        self, pack: int, layers: Sequence[int] | None, frames: slice = slice(None), out: Codes | None = None
    ) -> Codes:
        places = self._rows(layers)
        with self._refused("hidden"):
            return self._hidden.read(pack, [0] if self.codec.joins_layers else places, self._code_rows(frames), out)

    def _code_rows(self, frames: slice) -> slice:
        """Return the rows of codes that hold rows of a pack."""
        start, stop, _ = frames.indices(self.pack_frames)
        return self.codec.code_rows(start, stop - start)

    def _scale_of(self, pack: int, layers: Sequence[int] | None) -> Scale | None:
        if self._scale is None:
            return None
        with self._refused("scale"):
            return self._scale.read(pack, self._rows(layers))

    def hidden(self, utterance_id: str, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Read the hidden states of an utterance, float32 (layers, frames, dim). Raises RetortError for another id."""
        index = self.ids.find(utterance_id)
        if index is None:
            raise RetortError(f"{self.source} has no utterance {utterance_id!r}")
        return self.hidden_at(index, layers)

    def stem_pack(
        self, index: int, *, frames: slice = slice(None), out: Codes | None = None
    ) -> tuple[Codes, Scale | None]:
        """Read the stem's output of one pack as stored: codes (1, rows, width) and scale (1, ...).

        frames, out: as for `pack`.
        """
        with self._refused("stem"):
            codes_1RW = self._stem.read(index, rows=self._code_rows(frames), out=out)
            return codes_1RW, None if self._stem_scale is None else self._stem_scale.read(index)

    def stem_at(self, index: int) -> NDArray[np.float32]:
        """Read the stem's output for the utterance at a corpus index, float32 (frames, channels)."""
        pack, first, count = self._span_of(index)
        codes_1RW, scale = self.stem_pack(pack, frames=slice(first, first + count))
        stem_1TC = self.stem_codec.decode(codes_1RW, scale, first_frame=first, num_frames=count)
        stem_TC: NDArray[np.float32] = stem_1TC[0]
        return stem_TC

    def _span_of(self, index: int) -> tuple[int, int, int]:
        """Return the pack of the utterance at a corpus index, its first row there and its number of frames."""
        pack = int(self.pack_of[index])
        if pack < 0:
            raise RetortError(
                f"utterance {self.ids[index]!r} was dropped from {self.source} (longer than a pack or shorter than a "
                "frame)"
            )
        return pack, int(self.first_frame[index]), int(self.num_frames[index])

    def hidden_at(self, index: int, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Read the hidden states of the utterance at a corpus index, float32 (layers, frames, dim)."""
        pack, first, count = self._span_of(index)
        codes_LRW, scale = self._codes(pack, layers, slice(first, first + count)), self._scale_of(pack, layers)
        return self.codec_for(layers).decode(codes_LRW, scale, first_frame=first, num_frames=count)

    def own_frames(self, index: int, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Decode one pack without its padding, its utterances end to end: float32 (layers, frames, dim)."""
        pack = self.pack(index, layers)
        hidden_LFD = pack.codec.decode(pack.codes_LRW, pack.scale)
        return hidden_LFD[:, ranges(pack.first_frame, pack.num_frames)]

    def pooled(
        self, indices: NDArray[np.int64] | None = None, layers: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Read the time means of utterances (all, or those at `indices`), float32 (utterances, layers, dim).

        Only the chunks that hold the utterances are read, one at a time: all time means of 960 h are 11 GB.
        """
        rows: slice | list[int] = slice(None) if layers is None else self._rows(layers)  # a slice copies nothing
        if indices is None:
            values_ULD: NDArray[np.float32] = self._read(self._pooled, slice(None))
            return values_ULD[:, rows]
        num_layers = len(self.layers) if layers is None else len(layers)
        found_ULD = np.empty((len(indices), num_layers, self.dim), dtype=np.float32)
        chunk = self._pooled.chunks[0]  # utterances
        order = np.argsort(indices, kind="stable")  # places in `indices`, by chunk
        starts = np.unique(indices // chunk) * chunk
        for start, places in zip(starts, np.split(order, np.searchsorted(indices[order], starts[1:])), strict=False):
            block_ULD = self._read(self._pooled, slice(start, start + chunk))[:, rows]
            found_ULD[places] = block_ULD[indices[places] - start]
        return found_ULD


def _agree(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size in (found, None) for found, size in zip(shape, expected, strict=True)
    )
