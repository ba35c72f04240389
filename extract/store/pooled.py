"""Writing of the arrays of a store that have a row for each utterance: `pooled` and the index.

Time means are written shard by shard, in the order of the packs, to `rows/NNNNN.npy`. `pooled` has them in the order of
the corpus, and can be made again from these files.
"""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from extract.base.columns import TextColumn
from extract.store.packing import Packing

_CHUNK_ROWS = 4096  # utterances in a chunk of `pooled`
_GATHERED_BYTES = 256 << 20  # of `pooled` in memory while it is written, at least one chunk


def rows_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard's time means."""
    return folder / "rows" / f"{shard:05d}.npy"


def write_pooled(group: zarr.Group, packing: Packing, folder: Path, *, shape: tuple[int, int]) -> None:
    """Write `pooled` from the files of time means below `folder`; shape: layers and features of a row."""
    num_utterances = len(packing.pack)
    members = packing.by_pack
    rows_of = np.full(num_utterances, -1, dtype=np.int64)  # row of an utterance in all shards' rows, end to end
    rows_of[members.order] = np.arange(len(members.order))
    bounds = np.append(members.bounds[: -1 : packing.shard_packs], len(members.order))  # of the shards' rows
    chunks = (min(_CHUNK_ROWS, num_utterances), *shape)
    layout: dict[str, Any] = {"shape": (num_utterances, *shape), "chunks": chunks, "dtype": "float32"}
    pooled = group.create_array("pooled", **layout, compressors=None, fill_value=0, overwrite=True)
    step = chunks[0] * max(1, _GATHERED_BYTES // (4 * int(np.prod(chunks))))  # utterances gathered at a time
    for start in range(0, num_utterances, step):
        rows = rows_of[start : start + step]
        block = np.full((len(rows), *shape), np.nan, dtype=np.float32)  # a dropped utterance has no mean
        by_row = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]  # by shard, without dropped ones
        ends = np.searchsorted(rows[by_row], bounds)
        for shard in np.flatnonzero(np.diff(ends)).tolist():
            mine = by_row[ends[shard] : ends[shard + 1]]
            # Opened and closed again: a map for each shard would exceed the system's limit of open files.
            block[mine] = np.load(rows_path(folder, shard), mmap_mode="r")[rows[mine] - bounds[shard]]
        pooled[start : start + len(rows)] = block


def write_index(group: zarr.Group, packing: Packing, ids: TextColumn) -> None:
    """Write the position of every utterance, int32, and the ids, in corpus order."""
    columns: dict[str, NDArray[Any]] = {
        "pack": packing.pack.astype(np.int32),
        "first_frame": packing.first_frame.astype(np.int32),
        "num_frames": packing.num_frames.astype(np.int32),
        "ids": ids.lines(),
    }
    index = group.require_group("index")
    for name, values in columns.items():
        index.create_array(name, data=values, chunks=values.shape, compressors=None, overwrite=True)
