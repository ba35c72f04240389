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
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from extract.codec import CODECS, Codes, Scale
from extract.corpus import Corpus
from extract.errors import RetortError, unknown
from extract.files import read_json
from extract.place import CachedPlace, Expected, Place, RemotePlace, place_of
from extract.plan import group_by_pack

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
KEEP = frozenset({"frames", "pooled", "stem"})  # what a store may hold of an utterance
KEEP_DEFAULT = frozenset({"frames", "pooled"})


def check_keep(keep: frozenset[str]) -> None:
    """Raises RetortError for a `--keep` that no store has."""
    if odd := keep - KEEP:
        raise unknown("--keep", min(odd), KEEP)
    if "pooled" not in keep:
        raise RetortError(f"--keep {','.join(sorted(keep))}: `pooled` costs little and is always kept; add it")


def card_name(shard: int) -> str:
    """The object that says that a shard is finished."""
    return f"shards/{shard:05d}.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished store is made of. `objects` maps each file below the store to [bytes, sha256]."""

    format_version: int
    complete: bool
    fingerprint: str  # upstream, layers, codec, precision and plan settings
    digest: str  # of everything in the store
    upstream: dict[str, Any]
    layers: tuple[int, ...]
    dim: int
    convention: str
    hop_samples: int
    receptive_samples: int
    keep: tuple[str, ...]
    codec: str
    codec_error: dict[str, dict[str, Any]]  # by layer, and of "stem" when it is kept
    dtype: str
    dtype_error: dict[str, dict[str, Any]]  # by layer against fp32; empty for fp32
    threads: int  # torch's, in every worker: another number of them changes the last bits
    attention: str
    plan: dict[str, Any]
    corpus: dict[str, Any]
    dropped: tuple[str, ...]
    store: dict[str, str]  # root as given, path below it
    objects: dict[str, list[Any]]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, path: Path | str) -> "Manifest":
        """Strict: every field, no other. Raises RetortError that names what differs."""
        if value.get("format_version") != FORMAT_VERSION or not value.get("complete"):
            raise RetortError(
                f"{path} is no complete manifest of format {FORMAT_VERSION} (format_version "
                f"{value.get('format_version')!r}, complete {value.get('complete')!r}); "
                "run `python -m extract run` again"
            )
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ value.keys()):
            raise RetortError(
                f"{path} is no manifest: field {odd[0]!r} is {'missing' if odd[0] in names else 'unknown'}"
            )
        if value["codec"] not in CODECS:
            raise unknown(f"codec in {path}:", value["codec"], CODECS)
        tuples = {key: tuple(value[key]) for key in ("layers", "keep", "dropped")}
        return cls(**value | tuples)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        return cls.from_dict(read_json(path), path=path)

    @property
    def place(self) -> Place:
        """Where the store's objects lie."""
        return place_of(self.store["root"], self.store["path"])

    @property
    def location(self) -> Path:
        """The store's folder. Raises RetortError for a store at a URL."""
        if isinstance(place := self.place, RemotePlace):
            raise RetortError(
                f"this needs a store in a folder, not at {place}; copy it with `python -m extract mirror`"
            )
        return place.folder


def check_sizes(objects: Mapping[str, Expected], place: Place | CachedPlace, *, source: object) -> None:
    """Raises RetortError, which names the `source`, unless all `objects` are at `place` with their sizes."""
    found = {name: place.size(name) for name in objects}
    if not any(found.values()):
        raise RetortError(f"the store of {source} is gone: nothing lies at {place}; run `python -m extract run` again")
    for name, (size, _) in objects.items():
        if found[name] != size:
            raise RetortError(
                f"the store of {source} is damaged: {place}/{name} has "
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
        # `rows/` is the writer's: what no reader asks for need be neither looked for nor fetched.
        self._objects = {name: expected for name, expected in manifest.objects.items() if not name.startswith("rows/")}
        self._place = manifest.place.cached(manifest.digest, self._objects)

    @classmethod
    def open(cls, manifest: Path | str, corpus: Corpus | None = None) -> "StoreReader":
        """Open the store of a manifest and check that it is there, whole in size, and of `corpus` if one is given.

        Raises RetortError for a store that is gone, incomplete, damaged in size, or of another corpus.
        """
        path = Path(manifest)
        reader = cls(Manifest.read(path), source=path)
        check_sizes(reader._objects, reader._place, source=path)
        if corpus is not None and corpus.digest != reader.manifest.corpus["digest"]:
            raise RetortError(
                f"{path} describes features of corpus {reader.manifest.corpus['name']} "
                f"({reader.manifest.corpus['digest'][:12]}), not of {corpus.name} ({corpus.digest[:12]}); "
                "give the corpus it was made from or run `python -m extract run` on this one"
            )
        return reader

    def damaged(self) -> list[str]:
        """Names of the objects whose bytes, where they lie, do not match the manifest (reads every byte)."""
        place = self.manifest.place
        return [
            name
            for name, (size, digest) in self.manifest.objects.items()
            if place.size(name) != size or place.sha256(name) != digest
        ]

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self._place.zarr_store(), mode="r")

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    @cached_property
    def _hidden(self) -> zarr.Array[Any]:
        if "frames" not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no frames; extract with --keep frames,pooled"
            )
        return self._array("hidden")

    @cached_property
    def _scale(self) -> "zarr.Array[Any] | None":
        return None if self.codec.scale_dtype is None else self._array("scale")

    @cached_property
    def _pooled(self) -> zarr.Array[Any]:
        if "pooled" not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no pooled; extract with --keep frames,pooled"
            )
        return self._array("pooled")

    @cached_property
    def _stem(self) -> zarr.Array[Any]:
        if "stem" not in self.keep:
            raise RetortError(
                f"{self.source} keeps {', '.join(sorted(self.keep))} and no stem; extract with "
                "--keep frames,pooled,stem"
            )
        return self._array("stem")

    @cached_property
    def _stem_scale(self) -> "zarr.Array[Any] | None":
        return None if self.codec.scale_dtype is None else self._array("stem_scale")

    @property
    def stem_dim(self) -> int:
        """Channels of the stored stem. Raises RetortError for a store without."""
        return int(self._stem.shape[-1]) * self.codec.values_per_code

    @cached_property
    def ids(self) -> list[str]:
        """Utterance ids in corpus order."""
        return bytes(np.asarray(self._array("index/ids")[:])).decode().split("\n")

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def _column(self, name: str) -> NDArray[np.int64]:
        return np.asarray(self._array(f"index/{name}")[:]).astype(np.int64)

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
            return np.asarray(array[(pack, rows, *tail)])
        return np.stack([np.asarray(array[(pack, row, *tail)]) for row in rows])

    def hidden(self, utterance_id: str, layers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Hidden states of one utterance, float32 (layers, frames, dim). Raises RetortError for an unknown id."""
        if utterance_id not in self._index_of:
            raise RetortError(f"{self.source} has no utterance {utterance_id!r}")
        return self.hidden_at(self._index_of[utterance_id], layers)

    def stem_pack(self, index: int) -> tuple[Codes, Scale | None]:
        """The stem's output of one pack as stored: codes (1, pack_frames, width) and scale (1, ...), as of a layer."""
        scale = None if self._stem_scale is None else np.asarray(self._stem_scale[index])[None]
        return np.asarray(self._stem[index])[None], scale

    def stem_at(self, index: int) -> NDArray[np.float32]:
        """The stem's output for the utterance at a corpus index, float32 (frames, channels)."""
        pack, first, count = self._span_of(index)
        codes_1FW = np.asarray(self._stem[pack, first : first + count])[None]
        scale = None if self._stem_scale is None else np.asarray(self._stem_scale[pack])[None]
        stem_FC: NDArray[np.float32] = self.codec.decode(codes_1FW, scale, first_frame=first)[0]
        return stem_FC

    def _span_of(self, index: int) -> tuple[int, int, int]:
        """The pack of the utterance at a corpus index, its first row there and its number of frames."""
        pack = int(self.pack_of[index])
        if pack < 0:
            raise RetortError(f"utterance {self.ids[index]!r} was dropped from {self.source} (longer than a pack)")
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
        values: NDArray[np.float32] = np.asarray(self._pooled[:])
        if indices is not None:
            values = values[indices]
        return values[:, self._rows(layers)]
