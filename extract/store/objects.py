"""The list of a store's objects: name, bytes and sha256 of each, as arrays.

The store holds it as `objects.bin`, one row of 80 bytes for each object, sorted by name. The manifest records size and
digest of that file, so that it stays small: a store of 94,000 h has 1.5 million objects. To read it with numpy:

    np.fromfile("objects.bin", dtype=[("name", "S40"), ("bytes", "<i8"), ("sha256", "V32")])
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import ItemsView, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.base.errors import RetortError

OBJECTS_NAME = "objects.bin"
Expected = list[Any]  # [bytes, sha256] of an object
_ROW = np.dtype([("name", "S40"), ("bytes", "<i8"), ("sha256", "V32")])
_SHA256 = re.compile("[0-9a-f]{64}")
# Every object that a writer makes. `verify`, `mirror` and the cache write files by these names.
_OBJECT = re.compile(
    r"zarr\.json|(hidden|scale|stem|stem_scale|pooled)/(zarr\.json|c(/\d{1,9})+)"
    r"|codec/(zarr\.json|(hidden|stem)/(zarr\.json|[a-z]{1,16}/(zarr\.json|c(/0)+)))"
    r"|index/(zarr\.json|(pack|first_frame|num_frames|ids)/(zarr\.json|c/0))|rows/\d{5,9}\.npy",
    re.ASCII,
)


def is_object(name: str) -> bool:
    """Return True if a file of this name is an object of a store; a killed writer may have left other files."""
    return _OBJECT.fullmatch(name) is not None and len(name) <= _ROW["name"].itemsize


def is_sha256(text: object) -> bool:
    """Return True for a sha256 in hex."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_expected(value: Expected) -> bool:
    """Return True for [bytes, sha256]."""
    return len(value) == 2 and isinstance(value[0], int) and 0 <= value[0] < 1 << 63 and is_sha256(value[1])


class ObjectList(Mapping[str, Expected]):
    """Objects of a store, sorted by name: a mapping of each name to [bytes, sha256]."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self._rows = rows
        self._names = np.ascontiguousarray(rows["name"])

    @classmethod
    def of(cls, objects: Mapping[str, Expected], *, where: str) -> "ObjectList":
        """Convert a mapping. Raises RetortError, which begins with `where`, unless it is of objects of a store."""
        for name, expected in objects.items():
            if not is_object(name):
                raise RetortError(f"{where}: {name!r} is not the name of an object of a store")
            if not is_expected(expected):
                raise RetortError(f"{where}.{name}: got {expected!r}, expected [bytes, sha256 in hex]")
        rows = [(name.encode(), size, bytes.fromhex(digest)) for name, (size, digest) in sorted(objects.items())]
        return cls(np.array(rows, dtype=_ROW))

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> "ObjectList":
        """Parse the bytes of `objects.bin`. Raises RetortError, which begins with `where`, if they are not a list."""
        if len(data) % _ROW.itemsize:
            raise RetortError(f"{where}: {len(data)} bytes, expected {_ROW.itemsize} for each object")
        found = cls(np.frombuffer(data, dtype=_ROW))
        if (found._names[1:] <= found._names[:-1]).any():
            raise RetortError(f"{where}: names are not in order, each once")
        for name in found:
            if not is_object(name):
                raise RetortError(f"{where}: {name!r} is not the name of an object of a store")
        if (found._rows["bytes"] < 0).any():
            raise RetortError(f"{where}: an object has fewer than 0 bytes")
        return found

    def to_bytes(self) -> bytes:
        return self._rows.tobytes()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return (name.decode("ascii", "replace") for name in self._names.tolist())

    def __getitem__(self, name: str) -> Expected:
        wanted = name.encode()
        row = bisect_left(self._names, wanted)
        if row == len(self) or self._names[row] != wanted:
            raise KeyError(name)
        return [int(self._rows["bytes"][row]), self._rows["sha256"][row].tobytes().hex()]

    def items(self) -> ItemsView[str, Expected]:
        return _Items(self)

    def without_rows(self) -> "ObjectList":
        """Return the objects that a reader needs: all but the pooled rows of shards."""
        return ObjectList(self._rows[~np.char.startswith(self._names, b"rows/")])

    def below(self, folder: str) -> "ObjectList":
        """Return the objects in a folder of the store, such as `codec`."""
        return ObjectList(self._rows[np.char.startswith(self._names, f"{folder}/".encode())])

    def digest(self) -> str:
        """Return the sha256 of the list as compact JSON, [[name, [bytes, sha256]], …]: the digest of the store."""
        whole = hashlib.sha256(b"[")
        for number, (name, (size, digest)) in enumerate(self.items()):
            whole.update(f'{"," if number else ""}["{name}",[{size},"{digest}"]]'.encode())
        whole.update(b"]")
        return whole.hexdigest()

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return (objects, bytes) of each array, of the index, the rows and `codec`; of `metadata`, all zarr.json."""
        is_metadata = np.char.endswith(self._names, b"zarr.json")
        array_of = np.where(is_metadata, b"metadata", np.char.partition(self._names, b"/")[:, 0])
        found = {}
        for array in np.unique(array_of):
            sizes = self._rows["bytes"][array_of == array]
            found[array.decode()] = len(sizes), int(sizes.sum())
        return found


class _Items(ItemsView[str, Expected]):
    """Items in one pass, without a search for each name."""

    def __init__(self, objects: ObjectList) -> None:
        super().__init__(objects)
        self._objects = objects

    def __iter__(self) -> Iterator[tuple[str, Expected]]:
        rows = self._objects._rows
        for name, size, digest in zip(self._objects, rows["bytes"].tolist(), rows["sha256"].tolist(), strict=True):
            yield name, [size, digest.hex()]
