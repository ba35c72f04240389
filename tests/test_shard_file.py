"""Files of shards: their bytes are zarr-python's, and they are read as zarr-python reads them."""

import os
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from extract.store.codec import CODECS
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from extract.store.shard_file import DamagedShard, ShardedArray, morton_order, write_indexed
from extract.store.writer import EncodedPack, StoreWriter
from tests.evaluate_stores import make_corpus, make_store

DIM, STEM_DIM, FRAMES = 6, 4, 40


def writer_of(folder: Path, codec: str, layers: int, packs: int, shard_packs: int) -> StoreWriter:
    packing = pack_utterances(np.full(packs, 33), ids=range(packs), pack_frames=FRAMES, shard_packs=shard_packs)
    keep = frozenset({"frames", "pooled", "stem"})
    writer = StoreWriter(folder, packing, tuple(range(layers)), DIM, codec, keep, stem_dim=STEM_DIM)
    writer.create()
    return writer


def encoded(writer: StoreWriter, *, zeros: bool) -> list[EncodedPack]:
    """Encode packs of noise. `zeros`: with a layer of zeros, one of -0.0, a pack of zeros and shards of zeros."""
    generator = np.random.default_rng(0)
    found = []
    for pack in range(writer.packing.num_packs):
        hidden_LFD = generator.standard_normal((len(writer.layers), FRAMES, DIM)).astype(np.float32)
        stem_FC = generator.standard_normal((FRAMES, STEM_DIM)).astype(np.float32)
        if zeros:
            hidden_LFD[-1] = 0
            hidden_LFD[0] *= -0.0 if pack % 3 else 1
            stem_FC *= pack == 1
            hidden_LFD *= pack != 0 and pack < writer.packing.num_packs - 1
        found.append(writer.encode_pack(pack, hidden_LFD, stem_FC))
    return found


def chunks(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/c/**/*") if path.is_file()
    }


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("layers", "packs", "shard_packs"), [(1, 5, 2), (3, 7, 4), (5, 3, 1), (2, 3, 16), (9, 20, 6)])
def test_bytes_are_zarrs(tmp_path: Path, codec: str, layers: int, packs: int, shard_packs: int, zeros: bool) -> None:
    ours, theirs = (writer_of(tmp_path / name, codec, layers, packs, shard_packs) for name in ("ours", "theirs"))
    found = encoded(ours, zeros=zeros)
    group = zarr.open_group(theirs.folder, mode="r+")
    for shard in range(ours.packing.num_shards):
        where = ours.packing.packs_of(shard)
        ours.write_shard(shard, found[where.start : where.stop])
        for name in found[0].arrays:
            blocks = np.stack([pack.arrays[name] for pack in found[where.start : where.stop]])
            group[name][where.start : where.stop] = blocks  # type: ignore[index]
    assert chunks(ours.folder) == chunks(theirs.folder)
    if not zeros:
        assert {name.partition("/")[0] for name in chunks(ours.folder)} == found[0].arrays.keys()
    for name in found[0].arrays:
        array = group[name]
        assert isinstance(array, zarr.Array)
        has_layers = not name.startswith("stem")
        read = ShardedArray.of(array, has_layers=has_layers, file_of=existing(ours.folder))
        places = [*range(layers)][::-1] if has_layers else [0]
        for pack in range(packs):
            expected = np.asarray(array[pack])[places] if has_layers else np.asarray(array[pack])[None]
            np.testing.assert_array_equal(read.read(pack, places), expected)


def existing(folder: Path) -> Any:
    return lambda name: folder / name if (folder / name).is_file() else None


def test_rows_are_those_of_numpy_save(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "store", "int8", 3, 5, 2)
    found = encoded(writer, zeros=False)
    for shard in range(3):
        where = writer.packing.packs_of(shard)
        writer.write_shard(shard, packs := found[where.start : where.stop])
        np.save(tmp_path / "expected.npy", np.concatenate([pack.means for pack in packs]))
        assert (writer.folder / f"rows/{shard:05d}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_morton_order_of_a_grid() -> None:
    assert morton_order((3, 2)).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [2, 1]]
    assert morton_order((4, 1)).tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert morton_order((1, 1)).tolist() == [[0, 0]]


def test_writing_holds_no_second_copy_of_a_shard(tmp_path: Path) -> None:
    packs = [np.full((2, 512, 1024), pack + 1, dtype=np.int8) for pack in range(8)]  # 8 MB
    write_indexed(tmp_path / "warm", packs[:2], grid=(2, 2))
    tracemalloc.start()
    try:
        written = write_indexed(tmp_path / "shard", packs, grid=(8, 2))
        assert tracemalloc.get_traced_memory()[1] < packs[0].nbytes
    finally:
        tracemalloc.stop()
    assert written is not None and written[0] == 8 * 2 * (512 * 1024 + 16) + 4


def test_a_file_that_is_replaced_or_zeros(tmp_path: Path) -> None:
    path = tmp_path / "c/0/0/0"
    assert write_indexed(path, [np.ones((1, 2, 3), np.int8)], grid=(1, 1)) is not None
    (path.parent / ".0.01234567.aside").write_bytes(b"half")  # of a killed writer
    assert write_indexed(path, [np.ones((1, 2, 3), np.int8)], grid=(1, 1)) is not None
    assert [file.name for file in path.parent.iterdir()] == ["0"]
    assert write_indexed(path, [np.zeros((1, 2, 3), np.int8)], grid=(1, 1)) is None
    assert not list(path.parent.iterdir())


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lengths = [30, 28, 25, 22, 20, 11, 9, 5]
    card = make_corpus(tmp_path, labels={}, splits=["train"] * len(lengths), num_frames=lengths)
    return make_store(tmp_path, card, own_values, codec="int8", pack_frames=40)


def own_values(index: int, num_frames: int) -> NDArray[np.float32]:
    return np.random.default_rng(index).standard_normal((3, num_frames, 4)).astype(np.float32)


def test_rows_of_a_pack_into_memory_of_the_caller(manifest: Path) -> None:
    reader = StoreReader.open(manifest)
    whole = reader.pack(1)
    out = np.full((2, 7, 4), 99, dtype=np.int8)
    part = reader.pack(1, [2, 0], frames=slice(5, 12), out=out)
    assert part.codes_LRW is out
    np.testing.assert_array_equal(out, whole.codes_LRW[[2, 0], 5:12])
    assert whole.scale is not None and part.scale is not None
    np.testing.assert_array_equal(part.scale, whole.scale[[2, 0]])
    assert reader.pack(1, frames=slice(3, 3)).codes_LRW.shape == (3, 0, 4)


def test_threads_and_forked_processes_read_alike_and_leave_no_file_open(manifest: Path) -> None:
    reader = StoreReader.open(manifest)
    expected = [StoreReader.open(manifest).pack(pack).codes_LRW for pack in range(reader.num_packs)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    started = threading.Barrier(4)

    def read_all(first: int) -> list[NDArray[Any]]:
        started.wait()
        order = [(first + step) % reader.num_packs for step in range(200)]
        return [reader.pack(pack).codes_LRW for pack in order]

    with ThreadPoolExecutor(4) as pool:
        for first, found in enumerate(pool.map(read_all, range(4))):
            for step, codes_LFW in enumerate(found):
                np.testing.assert_array_equal(codes_LFW, expected[(first + step) % reader.num_packs])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    if not (child := os.fork()):
        equal = all(np.array_equal(reader.pack(pack).codes_LRW, expected[pack]) for pack in range(reader.num_packs))
        os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-40], "checksum"),
        (lambda data: data[:10], "fewer"),
        (lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "checksum"),
        (lambda data: data[:-4] + b"\0\0\0\0", "checksum"),
        (lambda data: data[-100:], "not of 160 bytes before it"),  # the chunks are cut off, the index is whole
        (lambda data: None, "is gone"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    group = zarr.create_group(tmp_path / "store")
    layout: dict[str, Any] = {"chunks": (1, 1, 40, 4), "shards": (2, 3, 40, 4), "compressors": None, "fill_value": 0}
    array = group.create_array("hidden", shape=(2, 3, 40, 4), dtype="int8", **layout)
    file = tmp_path / "store/hidden/c/0/0/0/0"
    write_indexed(file, list(np.ones((2, 3, 40, 4), np.int8)), grid=(2, 3))
    damaged = damage(file.read_bytes())
    file.unlink() if damaged is None else file.write_bytes(damaged)
    read = ShardedArray.of(array, has_layers=True, file_of=lambda name: tmp_path / "store" / name)
    with pytest.raises(DamagedShard, match=said):
        read.read(1, (2, 0))


@pytest.mark.parametrize(
    "layout",
    [
        {"chunks": (1, 1, 20, 4), "shards": (2, 3, 40, 4), "compressors": None},
        {"chunks": (1, 3, 20, 4), "compressors": None},
        {"chunks": (1, 1, 40, 4), "shards": (2, 3, 40, 4)},
    ],
)
def test_a_layout_that_is_never_written_is_refused(tmp_path: Path, layout: dict[str, Any]) -> None:
    array = zarr.create_group(tmp_path).create_array("hidden", shape=(2, 3, 40, 4), dtype="int8", **layout)
    with pytest.raises(DamagedShard, match="expected uncompressed packs"):
        ShardedArray.of(array, has_layers=True, file_of=lambda name: None)
