"""`python -m extract mirror M.json NEWROOT`: copy a finished store to another root, checked and resumable.

Every object is checked against its sha256 in the manifest when it is read. An object written to a folder is checked
there and renamed into place. An object written to a URL is checked by size, against a new listing at the end; S3
refuses an upload whose checksum differs. `extract verify` on the new manifest reads every byte back (a download).

The objects of a shard are copied first, then its record (`shards/NNNNN.json`, with their digests), and in the same way
the parameters of a fitted codec and theirs (`codec.json`); the list of objects and the manifest follow last.
A second run therefore continues a killed one: it skips objects with the right digest in a folder, and objects that a
shard record names at a URL.
"""

import fcntl
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from extract.base.errors import RetortError
from extract.base.files import ASIDES, check_out, json_text, parse_json, sweep, write_json, writing_in, written_aside
from extract.base.progress import ProgressBar
from extract.store.location import (
    LocalLocation,
    Location,
    RemoteLocation,
    check_bytes,
    check_sizes,
    root_text,
    staging_folder,
)
from extract.store.manifest import MANIFEST_NAME, Manifest, initial_weights_path, record_name
from extract.store.objects import OBJECTS_NAME, Expected
from extract.store.parameters import FIT_RECORD

_AT_ONCE = 4  # concurrent copies; one connection to an object store is slower than the network


@dataclass(frozen=True)
class Mirrored:
    """Result of a mirror: the manifest of the new root, and the amount copied."""

    manifest: Manifest
    copied_objects: int
    copied_bytes: int


@dataclass(frozen=True)
class _Part:
    """Objects that are copied one after another, and the record that follows them, if they are of a shard or a fit."""

    names: tuple[str, ...]
    record: str | None = None


def mirror(manifest: Path, root: str, *, new_manifest: Path | None = None) -> Mirrored:
    """Copy the store of `manifest` below `root` and write the new root's manifest there and to `new_manifest`.

    Raises RetortError for a store that is incomplete or damaged, for a root that is the old one or holds another store
    of the same name, and for a location that can't be reached or written.
    """
    if new_manifest:
        check_out(new_manifest, "--manifest")
    old = Manifest.read(manifest)
    if new_manifest:
        old.check_initial_weights(manifest)
    # The record of initial weights belongs to the manifest beside them, not to the copy inside the store.
    new = replace(old, store={"root": root_text(root), "path": old.store["path"]}, initial_weights=None)
    source, target = old.location, new.location
    check_sizes(old.objects, source, source=manifest)
    _refuse(source, target, old)
    with _alone_in(target), ProgressBar("mirror", total=_megabytes(old, old.objects), unit="MB") as bar:
        missing = _copy(old, source, target, bar)
    check_sizes(old.objects, new.location, source=manifest)
    if old.format_2 is None:
        target.write(OBJECTS_NAME, old.objects.to_bytes())
    target.write(MANIFEST_NAME, json_text(new.to_dict()).encode())
    if new_manifest:
        write_json(new_manifest, _with_initial_weights(old, new, manifest, new_manifest).to_dict())
    return Mirrored(new, len(missing), sum(old.objects[name][0] for name in missing))


def _refuse(source: Location, target: Location, manifest: Manifest) -> None:
    """Raise RetortError for a target that is the source, or has a finished store of the same name and other bytes."""
    same = (
        source.folder.resolve() == target.folder.resolve()
        if isinstance(source, LocalLocation) and isinstance(target, LocalLocation)
        else source == target
    )
    if same:
        raise RetortError(f"NEWROOT: the store is already at {target}; give another root")
    if target.size(MANIFEST_NAME) is not None:
        there = parse_json(target.read(MANIFEST_NAME), where=f"{target}/{MANIFEST_NAME}").get("digest")
        if there != manifest.digest:
            raise RetortError(
                f"NEWROOT: {target} holds a store of the same name with other bytes (digest {str(there)[:12]}, "
                f"not {manifest.digest[:12]}); delete it or give another root"
            )


def _copy(manifest: Manifest, source: Location, target: Location, bar: ProgressBar) -> list[str]:
    """Copy missing objects, several parts at once; return the names of the copied ones."""

    def copy(part: _Part) -> list[str]:
        return _copy_part(manifest, source, target, part, there)

    # Objects without a valid record in the source are copied one by one, like metadata and index.
    parts = [_Part(tuple(objects), record) for record, objects in _records(manifest, source).items()]
    recorded = {name for part in parts for name in part.names}
    parts += [_Part((name,)) for name in manifest.objects if name not in recorded]
    there = _there(manifest, target)
    bar.advance(_megabytes(manifest, there), detail="already copied")
    # Parameters first: a run that finds shards and no parameters can't go on.
    copied = [name for part in parts if part.record == FIT_RECORD for name in copy(part)]
    bar.advance(_megabytes(manifest, copied))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(copy, part) for part in parts if part.record != FIT_RECORD]
        try:
            for future in as_completed(futures):
                copied += (names := future.result())
                bar.advance(_megabytes(manifest, names))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error: started copies end, waiting ones are dropped
    return copied


def _records(manifest: Manifest, location: Location) -> dict[str, dict[str, list[object]]]:
    """Return the records at a location whose digests agree with the manifest: name -> objects."""
    possible = chain([FIT_RECORD], map(record_name, range(manifest.plan["num_shards"])))
    names = [name for name in possible if location.size(name) is not None]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        records = zip(names, pool.map(location.read, names), strict=True)
        read = {name: parse_json(data, where=f"{location}/{name}").get("objects") for name, data in records}
    return {
        name: objects
        for name, objects in read.items()
        if isinstance(objects, dict) and all(manifest.objects.get(one) == value for one, value in objects.items())
    }


def _there(manifest: Manifest, target: Location) -> set[str]:
    """Return the objects that the target already has: by digest in a folder, by size and record at a URL."""
    right_size = {name for name, (size, _) in manifest.objects.items() if target.size(name) == size}
    if isinstance(target, LocalLocation):
        return {name for name in right_size if target.sha256(name) == manifest.objects[name][1]}
    if target.size(MANIFEST_NAME) is not None:  # it has the same digest, or `_refuse` would have raised
        return right_size
    return right_size & {name for objects in _records(manifest, target).values() for name in objects}


def _copy_part(manifest: Manifest, source: Location, target: Location, part: _Part, there: set[str]) -> list[str]:
    names = [name for name in part.names if name not in there]
    for name in names:
        _copy_object(source, target, name, manifest.objects[name])
    if part.record and (names or target.size(part.record) != source.size(part.record)):
        target.write(part.record, source.read(part.record))
    return names


def _copy_object(source: Location, target: Location, name: str, expected: Expected) -> None:
    if isinstance(target, LocalLocation):
        source.fetch(name, target.folder / name, expected)
    elif isinstance(source, LocalLocation):
        check_bytes(source.folder / name, expected, what=f"{source}/{name}")
        target.put(source.folder / name, name)
    else:  # from URL to URL: through a file, so that the digest is checked before the upload
        with staging_folder() as folder:
            source.fetch(name, folder / "object", expected)
            target.put(folder / "object", name)


@contextmanager
def _alone_in(target: Location) -> Iterator[None]:
    """Let one mirror at a time write to a folder. At a URL two are harmless: they write the same bytes."""
    if isinstance(target, RemoteLocation):
        yield
        return
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        lock = (target.folder / ".lock").open("w")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise RetortError(f"NEWROOT: can't write to the folder {target} ({error.strerror})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(target.folder, f"**/{ASIDES}")  # of a killed mirror; once, and not at every object
        with writing_in(target.folder):
            yield


def _with_initial_weights(old: Manifest, new: Manifest, manifest: Path, new_manifest: Path) -> Manifest:
    """Copy the initial weights beside the new manifest, where training looks for them; return it with their record."""
    if old.initial_weights is None:
        return new
    source, target = manifest.parent / old.initial_weights["file"], initial_weights_path(new_manifest)
    if source.resolve() != target.resolve():
        with written_aside(target) as aside:
            shutil.copyfile(source, aside)
    return replace(new, initial_weights=old.initial_weights | {"file": target.name})


def _megabytes(manifest: Manifest, names: Iterable[str]) -> float:
    return float(sum(manifest.objects[name][0] for name in names)) / 1e6
