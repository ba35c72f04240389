"""The feature store, written: shard by shard, each by one worker, the manifest last.

A shard's arrays are written first (zarr renames each object into place), then `shards/NNNNN.json`, which says that the
shard is finished and holds the digests of its objects. Whoever comes again skips finished shards. `finish` gathers the
pooled rows (kept in `rows/`, so that `pooled` can be made again), writes the index and then the manifest: a store
without a manifest is never read.

A store at a URL is made in a staging folder of each process. A shard's objects are put, then its record; the disk that
its arrays took is freed at once, so a folder holds a few shards and the pooled rows. What is finished is what the other
side has.
"""

import fcntl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsArrayError, ContainsGroupError

from extract.base.errors import RetortError
from extract.base.files import parse_json, sha256_file, sha256_json, write_json, writing_in, written_aside
from extract.base.validate import check_fields
from extract.store.codec import CODECS, Codec, CodecError, Codes, Scale
from extract.store.location import LocalLocation, Location, RemoteLocation
from extract.store.manifest import is_object
from extract.store.packing import Packing
from extract.store.reader import MANIFEST_NAME, Manifest, record_name

_POOLED_ROWS = 4096  # utterances in a chunk of `pooled`
_RECORD = {"objects": dict[str, list[Any]], "codec_error": dict[str, list[float]]}  # fields of a shard record


@dataclass(frozen=True)
class CodedArray:
    """An array of codes and that of its scales: hidden states, or the stem's output."""

    codes: str  # its name in the store
    scale: str
    layers: tuple[int, ...]  # the axis of layers, if there is one
    dim: int


@dataclass(frozen=True)
class EncodedPack:
    """One pack as it will be stored, with the time means of its utterances in order of first frame."""

    arrays: dict[str, Codes | Scale]  # the pack's part of each array of the store, by the array's name
    means: NDArray[np.float32]  # (utterances of the pack, layers, dim)
    error: CodecError


@dataclass(frozen=True)
class StoreWriter:
    """Writes one store at `location`, and on to `remote` if there is one.

    Every method may run in any process; a shard belongs to one of them.
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

    @property
    def location(self) -> Location:
        """Where the finished store lies."""
        return self.remote or LocalLocation(self.folder)

    @property
    def codec(self) -> Codec:
        return CODECS[self.codec_name]

    @property
    def coded(self) -> list[CodedArray]:
        """What the codec is for, of all that is kept."""
        found = []
        if "frames" in self.keep:
            found.append(CodedArray("hidden", "scale", (len(self.layers),), self.dim))
        if self.stem_dim is not None:
            found.append(CodedArray("stem", "stem_scale", (), self.stem_dim))
        return found

    @property
    def error_rows(self) -> tuple[int | str, ...]:
        """What the rows of a codec's error are about; those of layers are 0 where no frames are kept."""
        return self.layers if self.stem_dim is None else (*self.layers, "stem")

    def create(self) -> None:
        """Make the empty arrays; a no-op where they are (their shapes follow from the fingerprint)."""
        widths = [self.codec.width(array.dim) for array in self.coded]  # refused before anything is made
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing_in(self.folder):
            self._create(widths)

    def _create(self, widths: list[int]) -> None:
        packs, shard, frames = self.packing.num_packs, self.packing.shard_packs, self.packing.pack_frames
        try:
            group = zarr.create_group(self.folder, zarr_format=3)
        except ContainsGroupError:
            group = zarr.open_group(self.folder, mode="r+")
        for array, width in zip(self.coded, widths, strict=True):
            layers, one = array.layers, (1,) * len(array.layers)
            self._array(
                group,
                array.codes,
                shape=(packs, *layers, frames, width),
                chunks=(1, *one, frames, width),
                shards=(shard, *layers, frames, width),
                dtype=self.codec.dtype,
            )
            if (scale := self.codec.scale_shape(frames, array.dim)) is not None:
                whole = (shard, *layers, *scale)
                # A row a layer is some kB: one chunk. Rows by frames are read with their codes, layer by layer.
                layout = {"chunks": whole} if len(scale) == 1 else {"chunks": (1, *one, *scale), "shards": whole}
                shape = (packs, *layers, *scale)
                self._array(group, array.scale, shape=shape, dtype=self.codec.scale_dtype, **layout)

    @staticmethod
    def _array(group: zarr.Group, name: str, **kwargs: Any) -> None:
        with suppress(ContainsArrayError):  # made by an earlier run, or by another extractor at this moment
            # No compressor: zstd saves 8% of float16 and 20% of int8 and costs two thirds of the read speed.
            group.create_array(name, compressors=None, fill_value=0, **kwargs)

    def finished(self, shard: int) -> bool:
        """Whether the shard is written, its objects in place with the recorded sizes.

        A file of another size is set aside: zarr would read it first when it writes the last, shorter shard.
        """
        if self.location.size(record_name(shard)) is None:
            return False
        recorded = self._read_record(shard)["objects"]
        wrong = [name for name, (size, _) in recorded.items() if self.location.size(name) != size]
        if isinstance(self.location, LocalLocation):
            for name in wrong:
                self.location.set_aside(name)
        return not wrong

    def encode_pack(
        self, pack: int, hidden_LFD: NDArray[np.float32], stem_FC: NDArray[np.float32] | None = None
    ) -> EncodedPack:
        """Encode one pack, float32 (layers, pack_frames, dim) with the rows past its last utterance 0.

        `stem_FC`: the stem's output (pack_frames, channels), where it is kept.
        Raises RetortError where a value is not finite.
        """
        means = []
        for index in self.packing.by_pack[pack]:
            first = self.packing.first_frame[index]
            own_LTD = hidden_LFD[:, first : first + self.packing.num_frames[index]]
            with np.errstate(invalid="ignore"):  # infinities of both signs, refused below
                means.append(own_LTD.mean(axis=1, dtype=np.float64).astype(np.float32))
        # One value that is not finite makes a mean that is not, and float64 sums of float32 do not overflow. What is
        # not finite in the stem is not in any layer above it.
        for index, mean_LD in zip(self.packing.by_pack[pack], means, strict=True):
            if not np.isfinite(mean_LD).all():
                raise self._not_finite(pack, int(index), mean_LD)
        values = {"hidden": hidden_LFD} if stem_FC is None else {"hidden": hidden_LFD, "stem": stem_FC[None]}
        arrays: dict[str, Codes | Scale] = {}
        errors = [] if "frames" in self.keep else [CodecError.none(len(self.layers))]
        for array in self.coded:
            try:
                codes, scale = self.codec.encode(values[array.codes])
            except RetortError as error:  # beyond the codec's range
                raise RetortError(f"{self._peak_of(pack, array.codes, values[array.codes])}: {error}") from None
            errors.append(CodecError.of(self.codec, values[array.codes], codes, scale))
            arrays[array.codes] = codes.reshape(*array.layers, *codes.shape[1:])
            if scale is not None:
                arrays[array.scale] = scale.reshape(*array.layers, *scale.shape[1:])
        return EncodedPack(arrays, np.stack(means), CodecError.joined(errors))

    def _utterance(self, index: int) -> str:
        return f"utterance {self.ids[index]!r}" if self.ids else f"the utterance at corpus index {index}"

    def _not_finite(self, pack: int, index: int, mean_LD: NDArray[np.float32]) -> RetortError:
        """The error for hidden states that are infinite or no number: a wider precision, or fewer layers."""
        layer = self.layers[int(np.argmax(~np.isfinite(mean_LD).all(axis=1)))]
        wider = {"fp16": "float16 ends at 65504; give --dtype bf16 or --dtype fp32", "bf16": "give --dtype fp32"}
        below = "" if layer == self.layers[0] else f"keep --layers below {layer}, or "
        return RetortError(
            f"{self._utterance(index)} (pack {pack}): the upstream's layer {layer} is not finite in {self.dtype}; "
            + wider.get(self.dtype, f"{below}take it out of the data set and make the corpus again")
        )

    def _peak_of(self, pack: int, name: str, values_LFD: NDArray[np.float32]) -> str:
        """The utterance and the layer, in words, that hold the largest value of a pack."""
        layer, frame, _ = np.unravel_index(int(np.abs(values_LFD).argmax()), values_LFD.shape)
        members = self.packing.by_pack[pack]
        index = int(members[np.searchsorted(self.packing.first_frame[members], frame, side="right") - 1])
        where = f"layer {self.layers[layer]}" if name == "hidden" else "the stem"
        return f"{self._utterance(index)} (pack {pack}), {where}"

    def write_shard(self, shard: int, packs: list[EncodedPack]) -> None:
        """Write one shard from all of its packs, in order."""
        assert len(packs) == len(self.packing.packs_of(shard))
        with writing_in(self.folder):
            objects = self._write_objects(shard, packs)
        if self.remote:
            self._send([*objects, record_name(shard)], self.remote)
            for name in objects.keys() - {f"rows/{shard:05d}.npy"}:
                (self.folder / name).unlink()

    def _write_objects(self, shard: int, packs: list[EncodedPack]) -> dict[str, list[Any]]:
        """Write a shard's objects, then its record; return the objects with their fingerprints."""
        names = [f"rows/{shard:05d}.npy"]
        group = zarr.open_group(self.folder, mode="r+")
        for name in packs[0].arrays:
            names.append(self._put(group, name, shard, [pack.arrays[name] for pack in packs]))
        with written_aside(self._rows(shard)) as aside, aside.open("wb") as file:
            np.save(file, np.concatenate([pack.means for pack in packs]))
        # A shard of zeros has no object: its absence reads as zeros, and leaves nothing to check.
        objects = {name: _fingerprint(self.folder / name) for name in names if (self.folder / name).is_file()}
        error = sum((pack.error for pack in packs), CodecError.none(len(self.error_rows)))
        write_json(self.folder / record_name(shard), {"objects": objects, "codec_error": error.to_dict()})
        return objects

    def _put(self, group: zarr.Group, name: str, shard: int, blocks: list[Any]) -> str:
        """Write one shard of an array; return the name of its object."""
        array, where = group[name], self.packing.packs_of(shard)
        assert isinstance(array, zarr.Array)
        array[where.start : where.stop] = np.stack(blocks)
        return f"{name}/c/{shard}" + "/0" * (array.ndim - 1)

    def _send(self, names: list[str], remote: RemoteLocation) -> None:
        for name in names:
            remote.put(self.folder / name, name)

    def finish(self, manifest: Manifest, *, ids: list[str]) -> Manifest:
        """Gather the pooled rows, write the index, then the manifest; return it with digests and codec error.

        One extractor at a time: a second one waits, then finds the same bytes to write.
        """
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._finish(manifest, ids)

    def _finish(self, manifest: Manifest, ids: list[str]) -> Manifest:
        shards = [self._read_record(shard) for shard in range(self.packing.num_shards)]
        error = CodecError.none(len(self.error_rows))
        objects: dict[str, list[Any]] = {}
        for shard in shards:
            error += CodecError.from_dict(shard["codec_error"])
            objects |= shard["objects"]
        if self.remote:
            self._bring_rows(objects, self.remote)
        of_shards = set(objects)
        group = zarr.open_group(self.folder, mode="r+")
        if "pooled" in self.keep:
            self._write_pooled(group)
        self._write_index(group, ids)
        for folder in ("pooled", "index"):
            for file in sorted((self.folder / folder).rglob("*")):
                name = file.relative_to(self.folder).as_posix()
                if file.is_file() and is_object(name):  # a killed writer may have left others
                    objects[name] = _fingerprint(file)
        for folder in ("", "hidden/", "scale/", "stem/", "stem_scale/"):
            name = f"{folder}zarr.json"
            if (self.folder / name).is_file():
                objects[name] = _fingerprint(self.folder / name)
        manifest = replace(
            manifest,
            complete=True,
            objects=dict(sorted(objects.items())),
            digest=sha256_json(sorted(objects.items())),
            codec_error={
                name: lost
                for name, lost in error.by_layer(self.error_rows).items()
                if name == "stem" or "frames" in self.keep
            },
        )
        LocalLocation(self.folder).tidy()  # before the manifest: whoever finds that has nothing left to do
        write_json(self.folder / MANIFEST_NAME, manifest.to_dict())
        if self.remote:
            self._send([*sorted(objects.keys() - of_shards), MANIFEST_NAME], self.remote)
        return manifest

    def _bring_rows(self, objects: dict[str, list[Any]], remote: RemoteLocation) -> None:
        """Rows of shards that another process finished, or an earlier run."""
        for name, expected in objects.items():
            file = self.folder / name
            if name.startswith("rows/") and not (file.is_file() and _fingerprint(file) == expected):
                remote.fetch(name, file, expected)

    def _write_pooled(self, group: zarr.Group) -> None:
        num_utterances = len(self.packing.pack)
        shape = (num_utterances, len(self.layers), self.dim)
        rows_of = np.full(num_utterances, -1, dtype=np.int64)
        order = np.concatenate(self.packing.by_pack)
        rows_of[order] = np.arange(len(order))
        parts = [np.load(self._rows(shard), mmap_mode="r") for shard in range(self.packing.num_shards)]
        bounds = np.cumsum([0, *(len(part) for part in parts)])
        chunks = (min(_POOLED_ROWS, num_utterances), *shape[1:])
        pooled = group.create_array(
            "pooled",
            shape=shape,
            chunks=chunks,
            dtype="float32",
            compressors=None,
            fill_value=0,
            overwrite=True,
        )
        for start in range(0, num_utterances, _POOLED_ROWS):
            rows = rows_of[start : start + _POOLED_ROWS]
            block = np.full((len(rows), *shape[1:]), np.nan, dtype=np.float32)  # a dropped utterance has no mean
            shard_of = np.searchsorted(bounds, rows, side="right") - 1
            for shard in np.unique(shard_of[rows >= 0]):
                mine = np.flatnonzero((shard_of == shard) & (rows >= 0))
                block[mine] = parts[shard][rows[mine] - bounds[shard]]
            pooled[start : start + len(rows)] = block

    def _write_index(self, group: zarr.Group, ids: list[str]) -> None:
        columns: dict[str, NDArray[Any]] = {
            "pack": self.packing.pack.astype(np.int32),
            "first_frame": self.packing.first_frame.astype(np.int32),
            "num_frames": self.packing.num_frames.astype(np.int32),
            "ids": np.frombuffer("\n".join(ids).encode(), dtype=np.uint8),
        }
        index = group.require_group("index")
        for name, values in columns.items():
            index.create_array(name, data=values, chunks=values.shape, compressors=None, overwrite=True)

    def _read_record(self, shard: int) -> dict[str, Any]:
        where = f"{self.location}/{record_name(shard)}"
        record = parse_json(self.location.read(record_name(shard)), where=where)
        return check_fields(
            {"objects": dict[str, list[Any]], "codec_error": dict[str, list[float]]}, record, where=where
        )

    def _rows(self, shard: int) -> Path:
        return self.folder / "rows" / f"{shard:05d}.npy"


def _fingerprint(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256_file(path)]
