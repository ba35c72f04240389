"""Location of a store's objects: a local folder, or a URL such as s3://bucket/prefix or hf://datasets/USER/NAME.

A store is a set of objects, listed with [bytes, sha256] in one of them (`extract.store.objects`). A location lists and
moves whole objects.

A store at a URL is read through a local cache. An object is fetched whole on first use, checked against the manifest
and renamed into place, so that zarr and numpy read local files and a second reading needs no network. The cache is
`stores/.cache` or RETORT_CACHE, with one folder per store digest; it may be deleted at any time.

`extract.store.object_store` lists the known URLs of object stores; `extract.store.aws` reads S3's credentials and
server; `extract.store.hub` reads from the Hugging Face Hub.
"""

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from extract.base.errors import RetortError, is_full_disk
from extract.base.files import ASIDES, in_main_tree, sha256_file, sweep, written_aside
from extract.store.objects import Expected

if TYPE_CHECKING:
    from extract.store.object_store import Objects

_DAMAGED = ".damaged"  # suffix of an object that was found damaged
_FILE = "file://"  # URLs of local folders, which need no cache
HUB = "hf://"


def is_url(root: Path | str) -> bool:
    """Return True if a root of stores is a URL, False if it is a local folder."""
    return "://" in str(root)


def root_text(root: Path | str) -> str:
    """Return a root of stores as manifests record it.

    Raises RetortError for an empty root, an incomplete URL, and a URL of the Hub, where stores are only published.
    """
    text = str(root).removeprefix(_FILE)
    if not text:
        raise RetortError("the ROOT of all stores is empty; give a folder such as stores, or a URL")
    if text.startswith(HUB):
        raise RetortError(
            f"the ROOT of all stores {text} is on the Hub, where finished stores are published and read; give a folder "
            "or an object store, then run `python -m extract push MANIFEST USER/NAME`"
        )
    if not is_url(text):
        if text.startswith(("s3:", "gs:", "az:")):  # most likely a URL with one slash
            raise RetortError(f"the ROOT of all stores {text} lacks a slash; expected a URL such as s3://bucket/prefix")
        return Path(text).as_posix()
    if (url := text.rstrip("/")).endswith(":"):
        raise RetortError(f"the ROOT of all stores {text} names no bucket; expected a URL such as s3://bucket/prefix")
    return url


def location_of(root: str, path: str) -> "Location":
    """Return the location of the store `path` below `root`, a URL or a folder (relative to the main working tree)."""
    root = root.removeprefix(_FILE)
    return RemoteLocation(f"{root}/{path}") if is_url(root) else LocalLocation(in_main_tree(root) / path)


@dataclass(frozen=True)
class LocalLocation:
    """Objects as files below a folder."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where it is missing."""
        file = self.folder / name
        return file.stat().st_size if file.is_file() else None

    def sha256(self, name: str) -> str:
        """Digest of an existing object (reads all of it)."""
        return sha256_file(self.folder / name)

    def read(self, name: str) -> bytes:
        """Read a small object."""
        return self.file(name).read_bytes()

    def file(self, name: str) -> Path:
        """Return the file of an object."""
        return self.folder / name

    def fetch(self, name: str, into: Path, expected: Expected) -> None:
        """Copy an object to the file `into`. Raises RetortError if its bytes are not the expected ones."""
        with written_aside(into, swept=True) as aside:
            shutil.copyfile(self.folder / name, aside)
            check_bytes(aside, expected, what=f"{self}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a small object atomically."""
        with written_aside(self.folder / name, swept=True) as aside:
            aside.write_bytes(data)

    def cached(self, digest: str, objects: Mapping[str, Expected]) -> "LocalLocation":
        """Return the location to read from: local files need no cache."""
        return self

    def zarr_store(self) -> LocalStore:
        """Return the store that zarr opens."""
        return LocalStore(self.folder, read_only=True)

    def set_aside(self, name: str) -> None:
        """Rename a damaged object, so that it counts as missing and is made again; `tidy` removes it then."""
        file = self.folder / name
        if file.is_file():
            file.replace(file.with_name(file.name + _DAMAGED))

    def tidy(self) -> None:
        """Remove damaged objects, and the temporary files of killed writers unless another process writes."""
        for file in self.folder.rglob(f"*{_DAMAGED}"):
            file.unlink(missing_ok=True)
        sweep(self.folder, f"**/{ASIDES}", "**/*.partial")  # of `written_aside`, and of zarr

    def staging(self) -> Path:
        """Return the folder in which the store is written: its own."""
        return self.folder


@dataclass(frozen=True)
class RemoteLocation:
    """Objects below a URL. Sizes come from one listing, which is kept and which `write` and `put` update.

    Every method raises RetortError if the server can't be reached or refuses the request.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @cached_property
    def _objects(self) -> "Objects":
        if self.url.startswith(HUB):
            from extract.store.hub import HubObjects

            return HubObjects(self.url)
        from extract.store.object_store import Objects  # imported late: a local store needs no client

        return Objects(self.url)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self._objects.sizes()

    def check(self) -> None:
        """Raise RetortError for a URL of an unknown kind, or without a bucket; no request is sent."""
        self._objects.check()

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where it is missing."""
        return self._sizes.get(name)

    def sha256(self, name: str) -> str:
        """Digest of an existing object (streams all of it)."""
        digest = hashlib.sha256()
        for piece in self._objects.chunks(name, self.size(name) or 0):
            digest.update(piece)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        """Read a small object."""
        return b"".join(self._objects.chunks(name))

    def fetch(self, name: str, into: Path, expected: Expected) -> None:
        """Download an object to the file `into`. Raises RetortError if its bytes are not the expected ones."""
        digest = hashlib.sha256()
        with written_aside(into, swept=True) as aside:
            with aside.open("wb") as file:
                for piece in self._objects.chunks(name, expected[0]):
                    digest.update(piece)
                    file.write(piece)
            _compare(expected, aside.stat().st_size, digest.hexdigest(), what=f"{self}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a small object atomically."""
        self._objects.put(name, data)
        self._sizes[name] = len(data)

    def put(self, file: Path, name: str) -> None:
        """Upload a file as an object. An existing object is replaced once all bytes have arrived."""
        self._sizes[name] = self._objects.put_file(name, file)

    def cached(self, digest: str, objects: Mapping[str, Expected]) -> "CachedLocation":
        """Return the location to read from: this one through the local cache."""
        return CachedLocation(self, _cache_root() / digest[:16], objects)  # 64 bits: digests do not collide

    def staging(self) -> Path:
        """Return the folder in which this process makes objects before it uploads them; removed when it ends."""
        return _process_staging_folder(self.url, _cache_root())


@dataclass(frozen=True)
class CachedLocation:
    """A remote location read through a local folder: `folder` is filled on demand with checked objects."""

    remote: RemoteLocation
    folder: Path
    objects: Mapping[str, Expected]

    def __str__(self) -> str:
        return str(self.remote)

    def size(self, name: str) -> int | None:
        """Return the bytes of an object; a request is sent only if the cache lacks it."""
        here = LocalLocation(self.folder).size(name)
        return here if here == self.objects[name][0] else self.remote.size(name)

    def file(self, name: str) -> Path:
        """Return the file of an object, fetched if the cache lacks it."""
        self.ensure(name)
        return self.folder / name

    def zarr_store(self) -> LocalStore:
        """Return the store that zarr opens. All metadata are fetched now, array data when they are first read."""
        for name in self.objects:
            if name.endswith("zarr.json"):
                self.ensure(name)
        return _FetchingStore(self)

    def ensure(self, name: str) -> None:
        """Fetch an object unless the cache has it. A lock makes other processes and threads wait for the first one."""
        if name not in self.objects or self._has(name):
            return
        self.remote.check()  # before a folder is made
        lock = self.folder / ".locks" / f"{name.replace('/', '.')}.lock"  # one per object: others are fetched meanwhile
        _make_folder(lock.parent)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self._has(name):  # another process may have fetched it meanwhile
                (into := self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                sweep(into.parent, ASIDES)  # of a killed reader; each shard of an array has a folder of its own
                self.remote.fetch(name, into, self.objects[name])

    def _has(self, name: str) -> bool:
        return LocalLocation(self.folder).size(name) == int(self.objects[name][0])


Location = LocalLocation | RemoteLocation


class _FetchingStore(LocalStore):
    """The cache's folder as a zarr store: a key is fetched before it is read."""

    def __init__(self, location: CachedLocation) -> None:
        super().__init__(location.folder, read_only=True)
        self.location = location

    def with_read_only(self, read_only: bool = False) -> Self:
        assert read_only
        return self

    # zarr uses the asynchronous or the synchronous method, depending on its version and pipeline.
    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        await asyncio.to_thread(self.location.ensure, key)
        return await super().get(key, prototype, byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self.location.ensure(key)
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def exists(self, key: str) -> bool:
        return key in self.location.objects


def check_sizes(objects: Mapping[str, Expected], location: "Location | CachedLocation", *, source: object) -> None:
    """Raise RetortError unless all `objects` are at `location` with their sizes; `source` names the manifest."""
    found = {name: location.size(name) for name in objects}
    if not any(found.values()):
        raise RetortError(
            f"the store of {source} is gone: nothing found at {location}; run `python -m extract run` again"
        )
    for name, (size, _) in objects.items():
        if found[name] != size:
            raise RetortError(
                f"the store of {source} is damaged: {location}/{name} has "
                f"{'no file' if found[name] is None else f'{found[name]} bytes'}, "
                f"expected {size} bytes; `python -m extract run` repairs it"
            )


def check_bytes(file: Path, expected: Expected, *, what: str) -> None:
    """Raise RetortError if a file differs from the expected size or digest; `what` names the object."""
    if (size := file.stat().st_size) != expected[0]:  # before the digest, which reads all bytes
        _compare(expected, size, "", what=what)
    _compare(expected, size, sha256_file(file), what=what)


def _compare(expected: Expected, size: int, digest: str, *, what: str) -> None:
    expected_size, expected_digest = expected
    if size != expected_size:
        raise RetortError(f"{what} is damaged: {size} bytes, expected {expected_size}; {_REPAIR}")
    if digest != expected_digest:
        raise RetortError(f"{what} is damaged: sha256 {digest[:12]}, expected {expected_digest[:12]}; {_REPAIR}")


_REPAIR = "delete it and run `python -m extract run` or `mirror` again, they make or copy what is missing"


@contextmanager
def staging_folder() -> Iterator[Path]:
    """Yield a folder on the cache's disk that is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=_make_folder(_cache_root()), prefix="staging-") as folder:
        yield Path(folder)


@cache
def _process_staging_folder(url: str, cache_root: Path) -> Path:
    """Make the staging folder of this process for a URL, once."""
    folder = tempfile.mkdtemp(dir=_make_folder(cache_root), prefix="staging-")
    # Not atexit, which does not run in a worker that is a copy of another process.
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)
    return Path(folder)


def _cache_root() -> Path:
    return in_main_tree(os.environ.get("RETORT_CACHE") or "stores/.cache")


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full_disk(error):
            raise
        raise RetortError(f"can't make the cache {folder} ({error.strerror}); set RETORT_CACHE to a folder") from None
    return folder
