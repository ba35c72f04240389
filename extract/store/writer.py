"""Writing a feature store: shard by shard, each by one worker, and the manifest last.

The objects of a shard are written first (`extract.store.shard_file`), then its record `shards/NNNNN.json` with their
digests. A shard with a record is finished and is skipped by later runs. `finish` gathers the pooled rows (kept in
`rows/`, so that `pooled` can be made again), writes the index, the list of all objects and then the manifest. A store
without a manifest is never read. Metadata, `pooled` and the index are written through zarr.

The parameters of a codec with a fit are objects too (`extract.store.parameters`). They are written before the first
shard, and their record after them; later runs and other processes read them.

A store at a URL is made in a staging folder of each process. The objects of a shard are uploaded, then its record, and
the arrays are deleted from the folder, which therefore holds a few shards and the pooled rows. A shard is finished if
its record is at the URL.

Shapes: L layers, F frames of a pack, T frames of an utterance, D features, C channels of the stem.
"""

import fcntl
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsArrayError, ContainsGroupError

from extract.base.columns import TextColumn
from extract.base.errors import RetortError
from extract.base.files import (
    ASIDES,
    parse_json,
    sha256_file,
    sweep,
    write_json,
    write_parts,
    writing_in,
)
from extract.base.validate import check_fields
from extract.store.codec import Codec, CodecError, Codes, Parameters, Scale
from extract.store.codecs import codec_named
from extract.store.location import LocalLocation, Location, RemoteLocation
from extract.store.manifest import MANIFEST_NAME, Manifest, record_name
from extract.store.objects import OBJECTS_NAME, Expected, ObjectList, is_object
from extract.store.packing import Packing
from extract.store.parameters import expected_of, objects_of, read_record, read_recorded, write_objects
from extract.store.pooled import rows_path, write_index, write_pooled
from extract.store.shard_file import write_indexed, write_whole

_RECORD = {"objects": dict[str, Expected], "codec_error": dict[str, list[float]]}  # fields of a shard record


@dataclass(frozen=True)
class CodedArray:
    """Two arrays of the store, of codes and of their scales: those of hidden states or of the stem's output."""

    codes: str  # name of the array of codes
    scale: str
    codec: Codec  # without parameters
    num_layers: int
    axis: tuple[int, ...]  # shape of the axis of layers, empty without one: of the stem, and of rows of all layers
    dim: int


@dataclass(frozen=True)
class EncodedPack:
    """One encoded pack, and the time means of its utterances in order of first frame."""

    arrays: dict[str, Codes | Scale]  # name of an array of the store -> this pack's part of it
    means: NDArray[np.float32]  # (utterances of the pack, layers, dim)
    error: CodecError


@dataclass(frozen=True)
class StoreWriter:
    """Writer of one store in `folder`, from which its objects go to `remote` if there is one.

    Every method may run in any process; each shard must be written by one of them alone: two writers of one zarr shard
    lose data without an error.
    """

    folder: Path
    packing: Packing
    layers: tuple[int, ...]
    dim: int
    codec_name: str
    keep: frozenset[str]
    remote: RemoteLocation | None = None
    stem_dim: int | None = None  # channels of the stem, where it is kept
    ids: Sequence[str] = ()  # of the corpus, for error lines
    dtype: str = "fp32"  # of the forward pass, for error lines
    # Of a codec with a fit, by name of the array of codes ("hidden", "stem"); empty for the others and before the fit.
    parameters: Mapping[str, Parameters] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.packing.align % self.codec.block_frames == 0, "a block of the codec would span two utterances"

    @property
    def location(self) -> Location:
        """Location of the finished store."""
        return self.remote or LocalLocation(self.folder)

    @cached_property
    def codec(self) -> Codec:
        """The codec without parameters."""
        return codec_named(self.codec_name)

    @property
    def needs_parameters(self) -> bool:
        """True if packs can be encoded with `parameters` alone, which are fitted once for a store."""
        return self.codec.needs_fit and bool(self.coded)

    def codec_of(self, array: CodedArray) -> Codec:
        """Return the codec that encodes an array, with its parameters."""
        return self._fitted[array.codes]

    @cached_property
    def _fitted(self) -> dict[str, Codec]:
        """The codec of each array of codes; kept, with what it moves to a device."""
        if not self.codec.needs_fit:
            return {array.codes: self.codec for array in self.coded}
        return {
            array.codes: array.codec.fitted(self.parameters[array.codes], (array.num_layers, array.dim))
            for array in self.coded
        }

    @property
    def coded(self) -> list[CodedArray]:
        """Kept arrays that the codec encodes."""
        found = []
        if "frames" in self.keep:
            count = len(self.layers)
            axis = () if self.codec.joins_layers else (count,)
            found.append(CodedArray("hidden", "scale", self.codec, count, axis, self.dim))
        if self.stem_dim is not None:
            found.append(CodedArray("stem", "stem_scale", self.codec.of_stem, 1, (), self.stem_dim))
        return found

    @property
    def error_rows(self) -> tuple[int | str, ...]:
        """Names of the rows of a `CodecError`: layers, then the stem; rows of layers are 0 if no frames are kept."""
        return self.layers if self.stem_dim is None else (*self.layers, "stem")

    def create(self) -> None:
        """Make the empty arrays unless they exist; their shapes follow from the fingerprint."""
        frames = self.packing.pack_frames  # raises for a dim before anything is made
        shapes = [array.codec.codes_shape(array.num_layers, frames, array.dim)[1:] for array in self.coded]
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, f"rows/{ASIDES}", f"shards/{ASIDES}")  # of killed writers; not again at every shard
        with writing_in(self.folder):
            self._create(shapes)

    def _create(self, shapes: list[tuple[int, int]]) -> None:
        packs, shard, frames = self.packing.num_packs, self.packing.shard_packs, self.packing.pack_frames
        try:
            group = zarr.create_group(self.folder, zarr_format=3)
        except ContainsGroupError:
            group = zarr.open_group(self.folder, mode="r+")
        for array, codes in zip(self.coded, shapes, strict=True):
            layers, one = array.axis, (1,) * len(array.axis)
            self._array(
                group,
                array.codes,
                shape=(packs, *layers, *codes),
                chunks=(1, *one, *codes),
                shards=(shard, *layers, *codes),
                dtype=self.codec.dtype,
            )
            if (scale := self.codec.scale_shape(frames, array.dim)) is not None:
                whole = (shard, *layers, *scale)
                # int8: (D,) per layer are some kB, one chunk per shard. int4: read with its codes, layer by layer.
                layout = {"chunks": whole} if len(scale) == 1 else {"chunks": (1, *one, *scale), "shards": whole}
                shape = (packs, *layers, *scale)
                self._array(group, array.scale, shape=shape, dtype=self.codec.scale_dtype, **layout)

    @staticmethod
    def _array(group: zarr.Group, name: str, **kwargs: Any) -> None:
        with suppress(ContainsArrayError):  # made by an earlier run, or by another process right now
            # Uncompressed: zstd would save 8% of float16 and 20% of int8, and cost two thirds of the read speed.
            group.create_array(name, compressors=None, fill_value=0, **kwargs)

    def read_parameters(self) -> Mapping[str, Parameters] | None:
        """Return the parameters that an earlier run or another process has stored.

        None if there are none, or they are damaged: they are to be fitted then.
        """
        return read_recorded(self.location, self.folder, [array.codes for array in self.coded])

    def write_parameters(self, parameters: Mapping[str, Parameters]) -> Mapping[str, Parameters]:
        """Store fitted parameters, then their record, and upload both; return the parameters to encode with.

        These are those of another process if it was first. Raises RetortError if shards were encoded with others.
        """
        with self._alone(), writing_in(self.folder):
            if (found := self.read_parameters()) is not None:
                return found
            objects = objects_of(parameters)
            changed = expected_of(objects) != read_record(self.location)
            if changed and any(map(self.finished, range(self.packing.num_shards))):
                raise RetortError(
                    f"the store at {self.location}: its shards were encoded with other parameters of codec "
                    f"{self.codec_name} than those fitted now, and theirs are missing or damaged; put back its codec/ "
                    "and codec.json from a copy of the store, or delete the store and run again"
                )
            write_objects(self.location, objects)
        return parameters

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Admit one process at a time."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def finished(self, shard: int) -> bool:
        """Return True if the shard has a record and all of its objects have the recorded sizes."""
        if self.location.size(record_name(shard)) is None:
            return False
        recorded = self._read_record(shard)["objects"]
        return all(self.location.size(name) == size for name, (size, _) in recorded.items())

    def encode_pack(
        self, pack: int, hidden_LFD: NDArray[np.float32], stem_FC: NDArray[np.float32] | None = None
    ) -> EncodedPack:
        """Encode one pack, float32 (L, F, D), whose utterances lie end to end and whose other rows are 0.

        stem_FC: the stem's output, if it is kept. Raises RetortError for a value that is not finite or out of the
        codec's range.
        """
        members, means = self.packing.by_pack[pack], []
        for index, first in zip(members, self._starts(pack), strict=True):
            own_LTD = hidden_LFD[:, first : first + self.packing.num_frames[index]]
            with np.errstate(invalid="ignore"):  # inf - inf, refused below
                means.append(own_LTD.mean(axis=1, dtype=np.float64).astype(np.float32))
        # A value that is not finite makes its mean not finite, and float64 sums of float32 values do not overflow. A
        # stem that is not finite makes every layer above it not finite.
        for index, mean_LD in zip(members, means, strict=True):
            if not np.isfinite(mean_LD).all():
                layer = self.layers[int(np.argmax(~np.isfinite(mean_LD).all(axis=1)))]
                raise self._not_finite(pack, int(index), layer)
        values = {"hidden": hidden_LFD} if stem_FC is None else {"hidden": hidden_LFD, "stem": stem_FC[None]}
        arrays: dict[str, Codes | Scale] = {}
        errors = [] if "frames" in self.keep else [CodecError.none(len(self.layers))]
        for array in self.coded:
            codec, spread_LFD, own_F = self.codec_of(array), values[array.codes], None
            if self.packing.align > 1:
                spread_LFD = spread_LFD[:, self.packing.spread(pack)]
                own_F = np.zeros(self.packing.pack_frames, dtype=bool)
                own_F[self.packing.rows_of(pack)] = True
            try:
                codes, scale = codec.encode(spread_LFD)
            except RetortError as error:  # beyond the codec's range
                raise RetortError(f"{self._peak_of(pack, array.codes, values[array.codes])}: {error}") from None
            errors.append(CodecError.of(codec, spread_LFD, codes, scale, own_F))
            arrays[array.codes] = codes.reshape(*array.axis, *codes.shape[1:])
            if scale is not None:
                arrays[array.scale] = scale.reshape(*array.axis, *scale.shape[1:])
        return EncodedPack(arrays, np.stack(means), CodecError.joined(errors))

    def _utterance(self, index: int) -> str:
        return f"utterance {self.ids[index]!r}" if self.ids else f"the utterance at corpus index {index}"

    def _starts(self, pack: int) -> NDArray[np.int64]:
        """Return the first frame of each utterance of a pack where they lie end to end, int64 (utterances,)."""
        num_frames = self.packing.num_frames[self.packing.by_pack[pack]]
        return np.cumsum(num_frames) - num_frames

    def check_finite(self, pack: int, own_FD: NDArray[np.float32], layer: int | str) -> None:
        """Raise RetortError for a value that is not finite in the own frames, end to end, of a layer or "stem"."""
        if len(odd := np.flatnonzero(~np.isfinite(own_FD).all(axis=1))):
            raise self._not_finite(pack, self._member_at(pack, int(odd[0])), layer)

    def _member_at(self, pack: int, frame: int) -> int:
        """Return the corpus index of the utterance that holds a frame of a pack whose utterances lie end to end."""
        return int(self.packing.by_pack[pack][np.searchsorted(self._starts(pack), frame, side="right") - 1])

    def _not_finite(self, pack: int, index: int, layer: int | str) -> RetortError:
        """Return the error for hidden states that are not finite; it advises a wider precision or fewer layers."""
        wider = {"fp16": "the largest float16 is 65504; use --dtype bf16 or fp32", "bf16": "use --dtype fp32"}
        below = "" if layer in (self.layers[0], "stem") else f"keep --layers below {layer}, or "
        return RetortError(
            f"{self._utterance(index)} (pack {pack}): the upstream's {row_name(layer)} is not finite in {self.dtype}; "
            + wider.get(self.dtype, f"{below}remove the utterance from the data set and make the corpus again")
        )

    def _peak_of(self, pack: int, name: str, values_LFD: NDArray[np.float32]) -> str:
        """Name the utterance and the layer that hold the largest value of a pack."""
        layer, frame, _ = np.unravel_index(int(np.abs(values_LFD).argmax()), values_LFD.shape)
        where = f"layer {self.layers[layer]}" if name == "hidden" else "the stem"
        return f"{self._utterance(self._member_at(pack, int(frame)))} (pack {pack}), {where}"

    def write_shard(self, shard: int, packs: list[EncodedPack]) -> None:
        """Write one shard from all of its packs, in order, and upload it if the store is at a URL."""
        assert len(packs) == len(self.packing.packs_of(shard))
        with writing_in(self.folder):
            objects = self._write_objects(shard, packs)
        if self.remote:
            self._send([*objects, record_name(shard)], self.remote)
            for name in objects.keys() - {f"rows/{shard:05d}.npy"}:
                (self.folder / name).unlink()

    def _write_objects(self, shard: int, packs: list[EncodedPack]) -> dict[str, list[Any]]:
        """Write a shard's objects, then its record; return the objects with their fingerprints."""
        objects = {f"rows/{shard:05d}.npy": self._write_rows(shard, packs)}
        for array in self.coded:
            for name in (array.codes, array.scale):
                if name in packs[0].arrays:
                    self._put(objects, array, name, shard, [pack.arrays[name] for pack in packs])
        error = sum((pack.error for pack in packs), CodecError.none(len(self.error_rows)))
        record = {"objects": objects, "codec_error": error.to_dict()}
        write_json(self.folder / record_name(shard), record, swept=True)
        return objects

    def _put(
        self, objects: dict[str, list[Any]], array: CodedArray, name: str, shard: int, blocks: list[NDArray[Any]]
    ) -> None:
        """Write one shard of `name`, and add it to `objects`; a shard of zeros has no object and reads as zeros."""
        target = f"{name}/c/{shard}" + "/0" * blocks[0].ndim
        path, num_packs = self.folder / target, self.packing.shard_packs
        if name == array.scale and blocks[0].ndim == len(array.axis) + 1:  # int8: one chunk, see `_create`
            written = write_whole(path, blocks, num_packs=num_packs)
        else:
            written = write_indexed(path, blocks, grid=(num_packs, math.prod(array.axis)))
        if written is not None:
            objects[target] = written

    def _write_rows(self, shard: int, packs: list[EncodedPack]) -> list[Any]:
        """Write the time means of a shard's utterances as `numpy.save` does, pack after pack."""
        shape = (sum(len(pack.means) for pack in packs), len(self.layers), self.dim)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        means = [np.ascontiguousarray(pack.means, dtype="<f4").reshape(-1).view(np.uint8) for pack in packs]
        return write_parts(rows_path(self.folder, shard), [header.getvalue(), *means], swept=True)

    def _send(self, names: list[str], remote: RemoteLocation) -> None:
        for name in names:
            remote.put(self.folder / name, name)

    def finish(self, manifest: Manifest, *, ids: TextColumn) -> Manifest:
        """Write `pooled`, the index and then the manifest; return the manifest with digests and codec error.

        A lock admits one process at a time; a second one then writes the same bytes.
        """
        with self._alone():
            return self._finish(manifest, ids)

    def _finish(self, manifest: Manifest, ids: TextColumn) -> Manifest:
        shards = [self._read_record(shard) for shard in range(self.packing.num_shards)]
        error = CodecError.none(len(self.error_rows))
        objects: dict[str, list[Any]] = {}
        if self.needs_parameters:
            recorded = read_record(self.location)
            assert recorded is not None, "a shard was encoded before the fit was recorded"
            objects |= recorded
        for shard in shards:
            error += CodecError.from_dict(shard["codec_error"])
            objects |= shard["objects"]
        if self.remote:
            self._fetch_rows(objects, self.remote)
        stored = set(objects)  # at the location
        group = zarr.open_group(self.folder, mode="r+")
        if "pooled" in self.keep:
            write_pooled(group, self.packing, self.folder, shape=(len(self.layers), self.dim))
        write_index(group, self.packing, ids)
        for folder in ("pooled", "index"):
            for file in sorted((self.folder / folder).rglob("*")):
                name = file.relative_to(self.folder).as_posix()
                if file.is_file() and is_object(name):  # a killed writer may have left other files
                    objects[name] = _fingerprint(file)
        for folder in ("", "hidden/", "scale/", "stem/", "stem_scale/"):
            name = f"{folder}zarr.json"
            if (self.folder / name).is_file():
                objects[name] = _fingerprint(self.folder / name)
        listed = ObjectList.of(objects, where=str(self.folder))
        manifest = replace(
            manifest,
            complete=True,
            object_list=[len(data := listed.to_bytes()), hashlib.sha256(data).hexdigest()],
            totals=listed.totals(),
            digest=listed.digest(),
            codec_error={
                name: lost
                for name, lost in error.by_layer(self.error_rows).items()
                if name == "stem" or "frames" in self.keep
            },
        )
        LocalLocation(self.folder).tidy()  # before the manifest, which ends all work on the store
        LocalLocation(self.folder).write(OBJECTS_NAME, data)
        write_json(self.folder / MANIFEST_NAME, manifest.to_dict())
        if self.remote:
            self._send([*sorted(objects.keys() - stored), OBJECTS_NAME, MANIFEST_NAME], self.remote)
        return manifest

    def _fetch_rows(self, objects: dict[str, list[Any]], remote: RemoteLocation) -> None:
        """Fetch the pooled rows of shards that another process or an earlier run finished."""
        for name, expected in objects.items():
            file = self.folder / name
            if name.startswith("rows/") and not (file.is_file() and _fingerprint(file) == expected):
                remote.fetch(name, file, expected)

    def _read_record(self, shard: int) -> dict[str, Any]:
        where = f"{self.location}/{record_name(shard)}"
        record = parse_json(self.location.read(record_name(shard)), where=where)
        return check_fields(_RECORD, record, where=where)


def _fingerprint(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256_file(path)]


def row_name(row: int | str) -> str:
    """Return the name of a row of `StoreWriter.error_rows` in a message."""
    return row if isinstance(row, str) else f"layer {row}"
