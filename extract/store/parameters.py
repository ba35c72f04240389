"""Parameters of a codec that is fitted to its store, as objects of the store.

    codec/hidden/NAME   zarr array of one uncompressed chunk: parameter NAME of all layers, stacked
    codec/stem/NAME     the same of the stem's output, as of one layer
    codec.json          record of the finished fit: [bytes, sha256] of each of these objects

The record is written last and before any shard: shards are encoded with the parameters that it names.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from extract.base.errors import RetortError
from extract.base.files import json_text, parse_json, sha256_file
from extract.base.validate import check_fields
from extract.store.codec import Parameters
from extract.store.location import Location, RemoteLocation
from extract.store.objects import Expected, ObjectList

FIT_RECORD = "codec.json"


def expected_of(objects: Mapping[str, bytes]) -> dict[str, Expected]:
    """Return the record of objects: name -> [bytes, sha256]."""
    return {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in objects.items()}


def read_record(location: Location) -> dict[str, Expected] | None:
    """Return the objects of the fit that a store records; None without a record, or for a damaged one."""
    if location.size(FIT_RECORD) is None:
        return None
    data, where = location.read(FIT_RECORD), f"{location}/{FIT_RECORD}"
    try:
        record = check_fields({"objects": dict[str, Expected]}, parse_json(data, where=where), where=where)
        return dict(ObjectList.of(record["objects"], where=where))
    except RetortError:
        return None  # it is made again with the parameters, unless shards depend on it: `StoreWriter.write_parameters`


def write_objects(location: Location, objects: Mapping[str, bytes]) -> None:
    """Write the objects of parameters, each atomically, then their record, which ends the fit."""
    for name, data in objects.items():
        location.write(name, data)
    location.write(FIT_RECORD, json_text({"objects": expected_of(objects)}).encode())


def read_recorded(location: Location, folder: Path, arrays: Sequence[str]) -> dict[str, Parameters] | None:
    """Return the parameters of arrays of codes that a store records; None if they are not there, or damaged.

    folder: of the store, or the one to which its objects are fetched.
    """
    if (recorded := read_record(location)) is None:
        return None
    for name, expected in recorded.items():
        file = folder / name
        if not file.is_file() or [file.stat().st_size, sha256_file(file)] != expected:
            if not isinstance(location, RemoteLocation) or location.size(name) != expected[0]:
                return None
            location.fetch(name, file, expected)
    group = zarr.open_group(folder, mode="r")
    return {array: read_parameters(group, array, recorded, where=f"the store at {location}") for array in arrays}


def objects_of(parameters: Mapping[str, Parameters]) -> dict[str, bytes]:
    """Return the objects that hold parameters, by array of codes ("hidden", "stem"): name of an object -> bytes."""
    objects: dict[str, Buffer] = {}
    root = zarr.create_group(MemoryStore(objects), zarr_format=3)
    for array, by_name in parameters.items():
        for name, values in by_name.items():
            # Zeros are written too: the chunk's size then bounds the memory that a reader takes.
            one = root.create_array(
                f"codec/{array}/{name}",
                shape=values.shape,
                chunks=values.shape,
                dtype=values.dtype,
                compressors=None,
                fill_value=0,
                config={"write_empty_chunks": True},
            )
            one[...] = values
    return {name: data.to_bytes() for name, data in objects.items() if name.startswith("codec/")}


def read_parameters(group: zarr.Group, array: str, objects: Mapping[str, Expected], *, where: str) -> Parameters:
    """Read the parameters of an array of codes, which are listed among `objects`, from the group of a store.

    Raises RetortError, which begins with `where`, for an array of another layout than `objects_of` writes.
    """
    found = {}
    for name in sorted({name.split("/")[2] for name in objects if name.startswith(f"codec/{array}/")} - {"zarr.json"}):
        path = f"codec/{array}/{name}"
        values = group.get(path)
        if not isinstance(values, zarr.Array) or not _is_one_chunk(values, objects):
            raise RetortError(
                f"{where}: {path} is not an array of one uncompressed chunk; run `python -m extract run` again"
            )
        found[name] = np.asarray(values[...])
    return found


def _is_one_chunk(array: "zarr.Array[Any]", objects: Mapping[str, Expected]) -> bool:
    """Return True if an array is one chunk whose bytes are listed: its size, from metadata, can then be trusted."""
    size, _ = objects.get(f"{array.path}/c" + "/0" * array.ndim, (None, None))
    return (
        array.shards is None
        and array.chunks == array.shape
        and not array.compressors
        and not array.filters
        and array.nbytes == size
    )
