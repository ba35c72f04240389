"""The manifest of a finished store: what it was made from, what it holds, and the bytes of every object.

A manifest travels: to other machines, as a DVC out, from people whom nobody here knows. Reading one is strict, so that
whoever holds a `Manifest` may trust its types, its counts, and that its names lead nowhere but into the store.
"""

import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from extract.base.errors import RetortError, unknown
from extract.base.files import read_json
from extract.base.validate import check_below, check_fields, check_name, check_type
from extract.store.codec import CODECS
from extract.store.location import Location, RemoteLocation, location_of

FORMAT_VERSION = 2
KEEP = frozenset({"frames", "pooled", "stem"})  # what a store may hold of an utterance
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
_SHA256 = re.compile("[0-9a-f]{64}")
# All that a writer writes; verify, mirror and the cache write by these names.
_OBJECT = re.compile(
    r"zarr\.json|(hidden|scale|stem|stem_scale|pooled)/(zarr\.json|c(/\d+)+)"
    r"|index/(zarr\.json|(pack|first_frame|num_frames|ids)/(zarr\.json|c/0))|rows/\d{5,}\.npy"
)


def is_object(name: str) -> bool:
    """Whether a file of this name below a store is an object of it; a killed writer may have left others."""
    return _OBJECT.fullmatch(name) is not None


def check_keep(keep: frozenset[str]) -> None:
    """Raises RetortError for a `--keep` that no store has."""
    if odd := keep - KEEP:
        raise unknown("--keep", min(odd), KEEP)
    if "pooled" not in keep:
        raise RetortError(f"--keep {','.join(sorted(keep))}: `pooled` costs little and is always kept; add it")


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
    # Optional, so that stores made before these were recorded stay valid.
    batching: dict[str, Any] | None = None  # how utterances are batched, and its measured error by layer
    stem: dict[str, Any] | None = None  # shape of the convolution stem: what a student of the same frames needs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, path: Path | str) -> "Manifest":
        """Strict: every field, no other, each of its type; counts that agree; names that stay in the store.

        Raises RetortError that names what differs.
        """
        if value.get("format_version") != FORMAT_VERSION or value.get("complete") is not True:
            raise RetortError(
                f"{path} is no complete manifest of format {FORMAT_VERSION} (format_version "
                f"{value.get('format_version')!r}, complete {value.get('complete')!r}); "
                "run `python -m extract run` again"
            )
        names = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if odd := sorted((required - value.keys()) | (value.keys() - names)):
            raise RetortError(
                f"{path} is no manifest: field {odd[0]!r} is {'missing' if odd[0] in names else 'unknown'}"
            )
        for name, hint in get_type_hints(cls).items():
            if name in value:
                check_type(hint, value[name], where=f"{path}: {name}")
        if value["codec"] not in CODECS:
            raise unknown(f"codec in {path}:", value["codec"], CODECS)
        tuples = {key: tuple(value[key]) for key in ("layers", "keep", "dropped")}
        manifest = cls(**value | tuples)
        manifest._check(path)
        return manifest

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        return cls.from_dict(read_json(path), path=path)

    @property
    def location(self) -> Location:
        """Where the store's objects lie."""
        return location_of(self.store["root"], self.store["path"])

    @property
    def folder(self) -> Path:
        """The store's folder. Raises RetortError for a store at a URL."""
        if isinstance(location := self.location, RemoteLocation):
            raise RetortError(
                f"this needs a store in a folder, not at {location}; copy it with `python -m extract mirror`"
            )
        return location.folder

    def _check(self, path: Path | str) -> None:
        for name, keys in (("upstream", _UPSTREAM), ("plan", _PLAN), ("corpus", _CORPUS), ("store", _STORE)):
            check_fields(keys, getattr(self, name), where=f"{path}: {name}")
        check_below(self.store["path"], where=f"{path}: store.path")
        check_name(self.corpus["name"], where=f"{path}: corpus.name")
        for name in ("fingerprint", "digest"):
            if not _SHA256.fullmatch(getattr(self, name)):
                raise RetortError(f"{path}: {name}: got {getattr(self, name)!r}, expected a sha256 in hex")
        for name, expected in self.objects.items():
            if not is_object(name):
                raise RetortError(f"{path}: objects: {name!r} is no name of an object of a store")
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
