"""Parameters of a codec that is fitted to its store, as objects of the store.

    codec/hidden/NAME   zarr array of one uncompressed chunk: parameter NAME of all layers, stacked
    codec/stem/NAME     the same of the stem's output, as of one layer
    codec.json          record of the finished fit: [bytes, sha256] of each of these objects

The record is written last and before any shard: shards are encoded with the parameters that it names.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from extract.base.errors import RetortError
from extract.store.codec import Parameters
from extract.store.objects import Expected

FIT_RECORD = "codec.json"


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
    prefix, last, found = f"codec/{array}/", "/zarr.json", {}
    paths = [name.removesuffix(last) for name in objects if name.startswith(prefix) and name.endswith(last)]
    for path in paths:
        if path == f"codec/{array}":  # the group itself
            continue
        values = group.get(path)
        if not isinstance(values, zarr.Array) or not _is_one_chunk(values, objects):
            raise RetortError(
                f"{where}: {path} is not an array of one uncompressed chunk; run `python -m extract run` again"
            )
        found[path.removeprefix(prefix)] = np.asarray(values[...])
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
