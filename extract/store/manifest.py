"""The manifest of a finished store: its origin, its contents, and the digest of the list of its objects.

Manifests come from other machines, from DVC's cache and from strangers. Reading one is strict: of a `Manifest` the
types, the counts and the names of objects, which stay inside the store, may be trusted.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from extract.base.errors import RetortError, unknown
from extract.base.files import read_json, sha256_file
from extract.base.validate import check_below, check_fields, check_name, parse
from extract.store.codecs import codec_named
from extract.store.location import LocalLocation, Location, RemoteLocation, check_bytes, check_sizes, location_of
from extract.store.objects import OBJECTS_NAME, Expected, ObjectList, is_expected, is_sha256

MANIFEST_NAME = "manifest.json"  # of the manifest that lies in the store itself
FORMAT_VERSION = 3
KEEP = frozenset({"frames", "pooled", "stem"})  # parts that a store may hold
KEEP_DEFAULT = frozenset({"frames", "pooled"})

_UPSTREAM = {
    "id": str,
    "name": str,
    "num_parameters": int,
    "note": str | None,
    "weights_sha256": str,
    "normalise": bool,
}
_PLAN = dict.fromkeys(("pack_frames", "shard_packs", "num_packs", "num_shards", "num_frames"), int)
_CORPUS = {"name": str, "digest": str, "num_utterances": int}
_CUT = {"cut_samples": int, "num_cut": int}  # also in `corpus`, if long utterances were cut
_STORE = {"root": str, "path": str}
_NEW_IN_3 = ("object_list", "totals", "num_dropped")  # fields
_INITIAL_WEIGHTS = {"file": str, "sha256": str, "num_blocks": int}


def record_name(shard: int) -> str:
    """Return the name of the object that records a finished shard: its objects, and the error of the codec."""
    return f"shards/{shard:05d}.json"


def check_keep(keep: frozenset[str]) -> None:
    """Raise RetortError for a `--keep` that a store cannot have."""
    if odd := keep - KEEP:
        raise unknown("--keep", min(odd), KEEP)
    if "pooled" not in keep:
        raise RetortError(f"--keep {','.join(sorted(keep))}: `pooled` costs little and is always kept; add it")


def initial_weights_path(manifest: Path) -> Path:
    """Return the path of a teacher's initial weights: beside its manifest, NAME.json -> NAME.initial.safetensors."""
    return manifest.with_suffix(".initial.safetensors")


class Format2(NamedTuple):
    """Lists of a manifest of format 2 (Retort 0.2.0), in place of `object_list`, `totals` and `num_dropped`."""

    objects: ObjectList
    dropped: tuple[str, ...]  # ids of utterances without features


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Record of a finished store. Its size does not grow with the store."""

    format_version: int
    complete: bool
    fingerprint: str  # upstream, layers, codec, precision and plan settings
    digest: str  # of everything in the store
    upstream: dict[str, Any]
    layers: tuple[int, ...]  # ascending; layer 0 is the input of the first block
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
    plan: dict[str, Any]  # summary of the packing
    corpus: dict[str, Any]
    num_dropped: int  # utterances without features: `index/pack` is -1
    store: dict[str, str]  # root as given, path below it
    object_list: Expected  # [bytes, sha256] of `objects.bin`; empty in format 2
    totals: dict[str, tuple[int, int]]  # (objects, bytes) by array, see `ObjectList.totals`
    versions: dict[str, str]
    # Optional, so that stores made before these were recorded stay valid.
    batching: dict[str, Any] | None = None  # how utterances are batched, and its measured error by layer
    stem: dict[str, Any] | None = None  # shape of the convolution stem: what a student of the same frames needs
    device: str | None = None  # model of the processor or GPU that ran the upstream
    float32: str | None = None  # arithmetic of float32 values: ieee, or tf32; on CUDA unknown for older stores
    initial_weights: dict[str, Any] | None = None  # file (a name beside the manifest), sha256 and num_blocks
    format_2: Format2 | None = None  # not in the file

    def to_dict(self) -> dict[str, Any]:
        value = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "format_2"}
        if self.format_2 is not None:
            value = {key: item for key, item in value.items() if key not in _NEW_IN_3}
            value |= {"objects": dict(self.format_2.objects), "dropped": self.format_2.dropped}
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, path: Path | str) -> "Manifest":
        """Parse strictly: every field, no other, of the right type; counts that agree; names that stay in the store.

        Raises RetortError that names the field, `path`, and what was expected.
        """
        if {"reader", "labels_digest"} <= value.keys():
            raise RetortError(f"{path} is a corpus card, expected a manifest, such as manifests/UPSTREAM/CORPUS.json")
        if value.get("format_version") not in (2, FORMAT_VERSION) or value.get("complete") is not True:
            raise RetortError(
                f"{path} is not a complete manifest of format {FORMAT_VERSION} (format_version "
                f"{value.get('format_version')!r}, complete {value.get('complete')!r}); "
                "run `python -m extract run` again"
            )
        for key in ("format_2", *(_NEW_IN_3 if value["format_version"] == 2 else ())):
            if key in value:
                raise unknown(f"key in {path}", key, (field.name for field in fields(cls)))
        manifest = cls._from_2(value, path) if value["format_version"] == 2 else parse(cls, value, where=str(path))
        manifest._check(path)
        return manifest

    @classmethod
    def _from_2(cls, value: dict[str, Any], path: Path | str) -> "Manifest":
        """Parse a manifest of format 2, which lists the objects and the ids of dropped utterances itself."""
        lists = check_fields({"objects": dict[str, Expected], "dropped": tuple[str, ...]}, value, where=str(path))
        objects = ObjectList.of(lists["objects"], where=f"{path}: objects")
        value = {key: item for key, item in value.items() if key not in lists}
        value |= {"object_list": [], "totals": objects.totals(), "num_dropped": len(lists["dropped"])}
        return replace(parse(cls, value, where=str(path)), format_2=Format2(objects, lists["dropped"]))

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        return cls.from_dict(read_json(path), path=path)

    @property
    def location(self) -> Location:
        """Location of the store's objects: a folder or a URL."""
        return location_of(self.store["root"], self.store["path"])

    @cached_property
    def objects(self) -> ObjectList:
        """The objects of the store, from the list at its location. Raises RetortError for another or a damaged list."""
        if self.format_2 is not None:
            return self.format_2.objects
        source = f"{self.upstream['name']} on {self.corpus['name']}"
        expected = {OBJECTS_NAME: self.object_list}
        place = self.location.cached(self.digest, expected)
        if isinstance(place, LocalLocation):
            check_sizes(expected, place, source=source)
        file = place.file(OBJECTS_NAME)  # of the cache, which fetches it once
        what = f"the store of {source}: {file}"
        check_bytes(file, self.object_list, what=what)
        objects = ObjectList.parse(file.read_bytes(), where=what)
        if objects.totals() != self.totals:
            raise RetortError(f"{what}: its totals are not those of the manifest; run `python -m extract run` again")
        return objects

    @property
    def num_objects(self) -> int:
        return sum(number for number, _ in self.totals.values())

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.totals.values())

    @property
    def cut_samples(self) -> int:
        """Samples of the longest part of a cut utterance, 0 for whole utterances (`Corpus.cut_long`)."""
        return int(self.corpus.get("cut_samples", 0))

    @property
    def folder(self) -> Path:
        """Folder of the store. Raises RetortError for a store at a URL."""
        if isinstance(location := self.location, RemoteLocation):
            raise RetortError(f"the store is at {location}, expected a folder; copy it with `python -m extract mirror`")
        return location.folder

    def check_initial_weights(self, manifest: Path) -> None:
        """Check the initial weights beside the file `manifest`, if this manifest records any.

        Raises RetortError if they are missing or their sha256 is not the recorded one.
        """
        if self.initial_weights is None:
            return
        path = manifest.parent / self.initial_weights["file"]
        found = sha256_file(path) if path.is_file() else None
        if found != (expected := self.initial_weights["sha256"]):
            raise RetortError(
                f"{path}: {f'sha256 {found[:12]}' if found else 'file not found'}, {manifest} records initial weights "
                f"with sha256 {expected[:12]}; run the same `python -m extract run` with --initial-blocks again"
            )

    def _check_initial_weights_record(self, path: Path | str) -> None:
        if (record := self.initial_weights) is None:
            return
        check_fields(_INITIAL_WEIGHTS, record, where=f"{path}: initial_weights")
        check_name(record["file"], where=f"{path}: initial_weights.file")
        if not is_sha256(record["sha256"]) or record["num_blocks"] < 1 or len(record) != len(_INITIAL_WEIGHTS):
            raise RetortError(
                f"{path}: initial_weights: got {record}, expected file, a sha256 in hex and at least 1 as num_blocks"
            )

    def _check(self, path: Path | str) -> None:
        for name, keys in (("upstream", _UPSTREAM), ("plan", _PLAN), ("corpus", _CORPUS), ("store", _STORE)):
            check_fields(keys, getattr(self, name), where=f"{path}: {name}")
        if "cut_samples" in self.corpus:
            check_fields(_CUT, self.corpus, where=f"{path}: corpus")
            if self.cut_samples < 16_000:
                raise RetortError(f"{path}: corpus.cut_samples: got {self.cut_samples}, expected 1 s, 16000, or more")
        self._check_initial_weights_record(path)
        check_below(self.store["path"], where=f"{path}: store.path")
        check_name(self.corpus["name"], where=f"{path}: corpus.name")
        for name in ("fingerprint", "digest"):
            if not is_sha256(getattr(self, name)):
                raise RetortError(f"{path}: {name}: got {getattr(self, name)!r}, expected a sha256 in hex")
        if self.format_2 is None and not is_expected(self.object_list):
            raise RetortError(f"{path}: object_list: got {self.object_list!r}, expected [bytes, sha256 in hex]")
        self._check_counts(path)
        self._check_codec(path)

    def _check_codec(self, path: Path | str) -> None:
        try:
            codec = codec_named(self.codec)
            if "frames" in self.keep:
                codec.width(self.dim)
        except RetortError as error:
            raise RetortError(f"{path}: codec: {error}") from None
        if (frames := self.plan["pack_frames"]) % codec.block_frames:
            raise RetortError(
                f"{path}: plan.pack_frames: got {frames}, expected a multiple of {codec.block_frames} for codec "
                f"{codec.name}"
            )

    def _check_counts(self, path: Path | str) -> None:
        if odd := set(self.keep) - KEEP:
            raise unknown(f"part in {path}: keep:", min(odd), KEEP)
        if not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            raise RetortError(f"{path}: layers: got {list(self.layers)}, expected ascending numbers from 0 up")
        plan, num_utterances = self.plan, self.corpus["num_utterances"]
        counts = {name: getattr(self, name) for name in ("dim", "hop_samples", "receptive_samples")}
        counts |= {f"plan.{name}": plan[name] for name in _PLAN} | {"corpus.num_utterances": num_utterances}
        if low := [name for name, count in counts.items() if count < 1]:
            raise RetortError(f"{path}: {low[0]}: got {counts[low[0]]}, expected at least 1")
        rows, _ = self.totals.get("rows", (0, 0))
        fits = (
            plan["num_shards"] == rows == -(-plan["num_packs"] // plan["shard_packs"])
            and plan["num_packs"] <= num_utterances
            and plan["num_frames"] <= plan["num_packs"] * plan["pack_frames"]
        )
        if not fits:
            raise RetortError(
                f"{path}: plan: {plan} does not fit {num_utterances} utterances and {rows} shards; the file was "
                "changed by hand, run `python -m extract run` again"
            )
