"""Location of a store's objects: a local folder, or an object store at a URL such as s3://bucket/prefix.

A store is a set of objects that its manifest names with [bytes, sha256]. A location says what is there and moves whole
objects. A store at a URL is read through a local cache: an object is fetched whole when it is first asked for, checked
against the manifest and renamed into place, so that zarr and numpy read local files, and what was read once is read
again without the network. The cache lies in `stores/.cache` or where RETORT_CACHE says, one folder a store digest;
it may be deleted at any time.

`extract.store.object_store` lists the known URLs; `extract.store.aws` reads S3's credentials and server.
"""

import asyncio
import atexit
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from extract.base.errors import RetortError
from extract.base.files import in_main_tree, sha256_file, sweep, written_aside

if TYPE_CHECKING:
    from extract.store.object_store import Objects

_DAMAGED = ".damaged"
_FILE = "file://"  # a URL of a local folder, which needs no cache
Expected = list[Any]  # [bytes, sha256], as a manifest has it for each object


def is_url(root: Path | str) -> bool:
    """Whether a root of stores is a URL; anything else is a local folder."""
    return "://" in str(root)


def root_text(root: Path | str) -> str:
    """A root of stores as manifests have it. Raises RetortError for an empty one, which would be the current folder."""
    text = str(root).removeprefix(_FILE)
    if not text:
        raise RetortError("the ROOT of all stores is empty; give a folder such as stores, or a URL")
    if not is_url(text):
        if text.startswith(("s3:", "gs:", "az:")):  # a folder of that name is hardly meant
            raise RetortError(f"the ROOT of all stores {text} lacks a slash; expected a URL such as s3://bucket/prefix")
        return Path(text).as_posix()
    if (url := text.rstrip("/")).endswith(":"):
        raise RetortError(f"the ROOT of all stores {text} names no bucket; expected a URL such as s3://bucket/prefix")
    return url


def location_of(root: str, path: str) -> "Location":
    """The location of the store `path` below `root`, a folder (relative: below the main working tree) or a URL."""
    root = root.removeprefix(_FILE)
    return RemoteLocation(f"{root}/{path}") if is_url(root) else LocalLocation(in_main_tree(root) / path)


@dataclass(frozen=True)
class LocalLocation:
    """A store's objects as files below a folder."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where it is missing."""
        file = self.folder / name
        return file.stat().st_size if file.is_file() else None

    def sha256(self, name: str) -> str:
        """Digest of an object that is there (reads all of it)."""
        return sha256_file(self.folder / name)

    def read(self, name: str) -> bytes:
        """A small object, whole."""
        return (self.folder / name).read_bytes()

    def fetch(self, name: str, into: Path, expected: Expected) -> None:
        """Copy an object to the file `into`. Raises RetortError when its bytes are not the expected ones."""
        with written_aside(into) as aside:
            shutil.copyfile(self.folder / name, aside)
            check_bytes(aside, expected, what=f"{self}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Put a small object, whole."""
        with written_aside(self.folder / name) as aside:
            aside.write_bytes(data)

    def cached(self, digest: str, objects: Mapping[str, Expected]) -> "LocalLocation":
        """The location to read from: local files need no cache."""
        return self

    def zarr_store(self) -> LocalStore:
        """What zarr opens."""
        return LocalStore(self.folder, read_only=True)

    def set_aside(self, name: str) -> None:
        """Rename a damaged object, so that it counts as missing and is made again; `tidy` then removes it."""
        file = self.folder / name
        if file.is_file():
            file.replace(file.with_name(file.name + _DAMAGED))

    def tidy(self) -> None:
        """Remove what was set aside, and what killed writers left, of ours and of zarr's, unless others write."""
        for file in self.folder.rglob(f"*{_DAMAGED}"):
            file.unlink(missing_ok=True)
        sweep(self.folder, "**/.*.aside", "**/*.partial")

    def staging(self) -> Path:
        """The folder in which the store is written: its own."""
        return self.folder


@dataclass(frozen=True)
class RemoteLocation:
    """A store's objects below an object store's URL. Sizes come from one listing, kept, to which `put` adds.

    Every method raises RetortError when the other side can't be reached or refuses.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @cached_property
    def _objects(self) -> "Objects":
        from extract.store.object_store import Objects  # late: a local store is read without it

        return Objects(self.url)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self._objects.sizes()

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where it is missing."""
        return self._sizes.get(name)

    def sha256(self, name: str) -> str:
        """Digest of an object that is there (streams all of it, keeps nothing)."""
        digest = hashlib.sha256()
        for piece in self._objects.chunks(name, self.size(name) or 0):
            digest.update(piece)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        """A small object, whole."""
        return b"".join(self._objects.chunks(name))

    def fetch(self, name: str, into: Path, expected: Expected) -> None:
        """Download an object to the file `into`. Raises RetortError when its bytes are not the expected ones."""
        digest = hashlib.sha256()
        with written_aside(into) as aside:
            with aside.open("wb") as file:
                for piece in self._objects.chunks(name, expected[0]):
                    digest.update(piece)
                    file.write(piece)
            _compare(expected, aside.stat().st_size, digest.hexdigest(), what=f"{self}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Put a small object, whole."""
        self._objects.put(name, data)
        self._sizes[name] = len(data)

    def put(self, file: Path, name: str) -> None:
        """Upload a file as an object; what was there is replaced once all bytes have arrived."""
        self._sizes[name] = self._objects.put_file(name, file)

    def cached(self, digest: str, objects: Mapping[str, Expected]) -> "CachedLocation":
        """The location to read from: this one through the local cache."""
        return CachedLocation(self, _cache_root() / digest[:16], objects)

    def staging(self) -> Path:
        """This process's folder, gone when it ends, in which the store's objects are made before they are put."""
        return _process_staging_folder(self.url, _cache_root())


@dataclass(frozen=True)
class CachedLocation:
    """A remote location seen through a local folder, for reading: sizes and, by zarr, objects."""

    remote: RemoteLocation
    folder: Path
    objects: Mapping[str, Expected]

    def __str__(self) -> str:
        return str(self.remote)

    def size(self, name: str) -> int | None:
        """Bytes of an object; the other side is asked (once) only for what the cache lacks."""
        here = LocalLocation(self.folder).size(name)
        return here if here == self.objects[name][0] else self.remote.size(name)

    def zarr_store(self) -> LocalStore:
        """What zarr opens. All metadata come at once: whoever then reads whole arrays needs the other side no more."""
        _make_folder(self.folder)
        for name in self.objects:
            if name.endswith("zarr.json"):
                self.bring(name)
        return _FetchingStore(self)

    def bring(self, name: str) -> None:
        """Make sure that an object is in the cache. Processes and threads that want the same one wait for the first."""
        if name not in self.objects or self._has(name):
            return
        lock = self.folder / ".locks" / f"{name.replace('/', '.')}.lock"
        lock.parent.mkdir(exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self._has(name):
                self.remote.fetch(name, self.folder / name, self.objects[name])

    def _has(self, name: str) -> bool:
        return LocalLocation(self.folder).size(name) == int(self.objects[name][0])


Location = LocalLocation | RemoteLocation


class _FetchingStore(LocalStore):
    """The cache's folder for zarr, which asks for keys: whatever it asks for is brought first."""

    def __init__(self, location: CachedLocation) -> None:
        super().__init__(location.folder, read_only=True)
        self.location = location

    def with_read_only(self, read_only: bool = False) -> Self:
        assert read_only
        return self

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        await asyncio.to_thread(self.location.bring, key)
        return await super().get(key, prototype, byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self.location.bring(key)
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def exists(self, key: str) -> bool:
        return key in self.location.objects


def check_bytes(file: Path, expected: Expected, *, what: str) -> None:
    """Raises RetortError when a file is not of the expected size and digest; `what` names the object."""
    if (size := file.stat().st_size) != expected[0]:
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
    """A folder on the cache's disk that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=_make_folder(_cache_root()), prefix="staging-") as folder:
        yield Path(folder)


@cache
def _process_staging_folder(url: str, cache_root: Path) -> Path:
    folder = tempfile.mkdtemp(dir=_make_folder(cache_root), prefix="staging-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cache_root() -> Path:
    return in_main_tree(os.environ.get("RETORT_CACHE") or "stores/.cache")


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _raise_if_full(error)
        raise RetortError(f"can't make the cache {folder} ({error.strerror}); set RETORT_CACHE to a folder") from None
    return folder


def _raise_if_full(error: BaseException) -> None:
    """A full disk is this machine's trouble, and the command says so itself."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
