"""The manifest of a finished store: its origin, its contents, and size and digest of every object.

Manifests come from other machines, from DVC's cache and from strangers. Reading one is strict: of a `Manifest` the
types, the counts and the names of objects, which stay inside the store, may be trusted.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.files import read_json, sha256_file
from extract.base.validate import check_below, check_fields, check_name, parse
from extract.store.codec import CODECS
from extract.store.location import Location, RemoteLocation, location_of

MANIFEST_NAME = "manifest.json"  # of the manifest that lies in the store itself
FORMAT_VERSION = 2
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
_STORE = {"root": str, "path": str}
_INITIAL_WEIGHTS = {"file": str, "sha256": str, "num_blocks": int}
_SHA256 = re.compile("[0-9a-f]{64}")
# Every object that a writer makes. `verify`, `mirror` and the cache write files by these names.
_OBJECT = re.compile(
    r"zarr\.json|(hidden|scale|stem|stem_scale|pooled)/(zarr\.json|c(/\d+)+)"
    r"|index/(zarr\.json|(pack|first_frame|num_frames|ids)/(zarr\.json|c/0))|rows/\d{5,}\.npy"
)


def record_name(shard: int) -> str:
    """Return the name of the object that records a finished shard: its objects, and the error of the codec."""
    return f"shards/{shard:05d}.json"


def is_object(name: str) -> bool:
    """Return True if a file of this name is an object of a store; a killed writer may have left other files."""
    return _OBJECT.fullmatch(name) is not None


def check_keep(keep: frozenset[str]) -> None:
    """Raise RetortError for a `--keep` that a store cannot have."""
    if odd := keep - KEEP:
        raise unknown("--keep", min(odd), KEEP)
    if "pooled" not in keep:
        raise RetortError(f"--keep {','.join(sorted(keep))}: `pooled` costs little and is always kept; add it")


def initial_weights_path(manifest: Path) -> Path:
    """Return the path of a teacher's initial weights: beside its manifest, NAME.json -> NAME.initial.safetensors."""
    return manifest.with_suffix(".initial.safetensors")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Record of a finished store. `objects` maps the name of each file below the store to [bytes, sha256]."""

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
    dropped: tuple[str, ...]  # ids of utterances without features
    store: dict[str, str]  # root as given, path below it
    objects: dict[str, list[Any]]
    versions: dict[str, str]
    # Optional, so that stores made before these were recorded stay valid.
    batching: dict[str, Any] | None = None  # how utterances are batched, and its measured error by layer
    stem: dict[str, Any] | None = None  # shape of the convolution stem: what a student of the same frames needs
    device: str | None = None  # model of the processor or GPU that ran the upstream
    initial_weights: dict[str, Any] | None = None  # file (a name beside the manifest), sha256 and num_blocks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, path: Path | str) -> "Manifest":
        """Parse strictly: every field, no other, of the right type; counts that agree; names that stay in the store.

        Raises RetortError that names the field, `path`, and what was expected.
        """
        if value.get("format_version") != FORMAT_VERSION or value.get("complete") is not True:
            raise RetortError(
                f"{path} is not a complete manifest of format {FORMAT_VERSION} (format_version "
                f"{value.get('format_version')!r}, complete {value.get('complete')!r}); "
                "run `python -m extract run` again"
            )
        manifest = parse(cls, value, where=str(path))
        manifest._check(path)
        return manifest

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        return cls.from_dict(read_json(path), path=path)

    @property
    def location(self) -> Location:
        """Location of the store's objects: a folder or a URL."""
        return location_of(self.store["root"], self.store["path"])

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
        if not _SHA256.fullmatch(record["sha256"]) or record["num_blocks"] < 1 or len(record) != len(_INITIAL_WEIGHTS):
            raise RetortError(
                f"{path}: initial_weights: got {record}, expected file, a sha256 in hex and at least 1 as num_blocks"
            )

    def _check(self, path: Path | str) -> None:
        if self.codec not in CODECS:
            raise unknown(f"codec in {path}:", self.codec, CODECS)
        for name, keys in (("upstream", _UPSTREAM), ("plan", _PLAN), ("corpus", _CORPUS), ("store", _STORE)):
            check_fields(keys, getattr(self, name), where=f"{path}: {name}")
        self._check_initial_weights_record(path)
        check_below(self.store["path"], where=f"{path}: store.path")
        check_name(self.corpus["name"], where=f"{path}: corpus.name")
        for name in ("fingerprint", "digest"):
            if not _SHA256.fullmatch(getattr(self, name)):
                raise RetortError(f"{path}: {name}: got {getattr(self, name)!r}, expected a sha256 in hex")
        for name, expected in self.objects.items():
            if not is_object(name):
                raise RetortError(f"{path}: objects: {name!r} is not the name of an object of a store")
            if len(expected) != 2 or not isinstance(expected[0], int) or not _SHA256.fullmatch(str(expected[1])):
                raise RetortError(f"{path}: objects.{name}: got {expected!r}, expected [bytes, sha256 in hex]")
        self._check_counts(path)

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
        rows = sum(name.startswith("rows/") for name in self.objects)
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
