"""Cost at 960 h and more: file descriptors, folder listings, bytes read and memory, counted and not timed.

The stores are tiny and have many shards or chunks, which is all that the costs depend on.
"""

import os
import resource
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evaluate.pooled import draw
from extract.base import dask_pool
from extract.base.dask_pool import DaskPool
from extract.base.errors import RetortError
from extract.stats import measure
from extract.store import pooled
from extract.store.mirror import mirror
from extract.store.packing import pack_utterances
from extract.store.reader import StoreReader
from tests.evaluate_stores import make_corpus, make_store
from tests.processes import WARM

DESCRIPTORS = 40  # far below the common limit of 1,024
_listed: Counter[str] | None = None  # folders that were listed, by name


def _count_listings(event: str, arguments: tuple[object, ...]) -> None:
    if _listed is not None and event in ("os.scandir", "os.listdir") and isinstance(arguments[0], str | os.PathLike):
        _listed[Path(arguments[0]).name] += 1


sys.addaudithook(_count_listings)  # of every Python function that lists a folder; a hook is for the whole process


def numbered(index: int, frames: int) -> NDArray[np.float32]:
    """Two layers of one feature: the utterance's number, and its negative."""
    return np.full((2, frames, 1), index, dtype=np.float32) * np.array([1, -1], dtype=np.float32)[:, None, None]


def make(folder: Path, num: int) -> Path:
    """Write a store whose shards have two packs of one utterance each; return its manifest."""
    folder.mkdir(exist_ok=True)
    card = make_corpus(folder, labels={}, splits=["train"] * num, num_frames=[4] * num)
    return make_store(folder, card, numbered, pack_frames=4, codec="float16")


def make_with_few_descriptors(folder: Path, num: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    make(folder, num)


def test_a_store_needs_few_descriptors_whatever_its_number_of_shards(tmp_path: Path) -> None:
    num = 2 * DESCRIPTORS + 20  # two for each shard
    child = WARM.Process(target=make_with_few_descriptors, args=(tmp_path, num))
    child.start()
    child.join()
    assert child.exitcode == 0
    reader = StoreReader.open(next(tmp_path.glob("stores/hand/*/manifest.json")))
    assert reader.manifest.plan["num_shards"] > DESCRIPTORS
    np.testing.assert_array_equal(reader.pooled()[:, :, 0], np.outer(np.arange(num), [1, -1]))


def test_folders_of_shards_are_listed_as_often_for_many_shards(tmp_path: Path) -> None:
    def listings(num: int) -> tuple[int, int]:
        global _listed
        _listed = Counter()
        manifest = make(tmp_path / str(num), num)
        mirror(manifest, str(tmp_path / f"copy of {num}"))
        found, _listed = _listed, None
        return found["rows"], found["shards"]

    few, many = listings(4), listings(40)
    assert few == many
    assert min(few) > 0


def test_time_means_are_read_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled, "_CHUNK_ROWS", 4)  # utterances of a chunk
    manifest = make(tmp_path, 12)
    reader = StoreReader.open(manifest)
    expected = np.outer(np.arange(12), [1, -1])
    for damaged in (0, 2):
        os.truncate(manifest.parent / f"pooled/c/{damaged}/0/0", 3)
    indices = np.array([7, 4, 7, 5])  # of the second chunk, unsorted and repeated
    np.testing.assert_array_equal(reader.pooled(indices)[:, :, 0], expected[indices])
    np.testing.assert_array_equal(reader.pooled(indices, layers=[1])[:, :, 0], expected[indices, 1:])
    assert reader.pooled(np.array([], dtype=np.int64)).shape == (0, 2, 1)
    with pytest.raises(RetortError, match="pooled can't be read"):
        reader.pooled(np.array([5, 8]))
    with pytest.raises(RetortError, match="pooled can't be read"):
        reader.pooled()


@pytest.mark.parametrize("gathered", [1, 1 << 20])
def test_time_means_are_the_same_in_one_block_and_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: int
) -> None:
    monkeypatch.setattr(pooled, "_CHUNK_ROWS", 3)
    monkeypatch.setattr(pooled, "_GATHERED_BYTES", gathered)
    num, frames = 20, [4, 9, 3, 5, 2] * 4
    card = make_corpus(tmp_path, labels={}, splits=["train"] * num, num_frames=frames)
    manifest = make_store(tmp_path, card, numbered, pack_frames=8, drop_long=True)
    expected = np.where(np.array(frames) > 8, np.nan, np.arange(num))
    found = StoreReader.open(manifest)
    np.testing.assert_array_equal(found.pooled()[:, :, 0], np.outer(expected, [1, -1]))
    order = np.random.default_rng(0).integers(0, num, 50)
    np.testing.assert_array_equal(found.pooled(order), found.pooled()[order])


def test_statistics_do_not_serialise_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = StoreReader.open(make(tmp_path, 8))
    serialised = []

    def counting(reader: StoreReader) -> dict[str, object]:
        serialised.append(reader)
        return vars(reader)

    monkeypatch.setattr(StoreReader, "__getstate__", counting, raising=False)
    assert measure(reader).num_packs == 8
    assert not serialised


def test_packs_cost_two_numbers_an_utterance(monkeypatch: pytest.MonkeyPatch) -> None:
    num = 100_000
    packing = pack_utterances(np.full(num, 4), ids=range(num), pack_frames=4, shard_packs=4)  # type: ignore[arg-type]
    assert packing.num_packs == num
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    members = packing.by_pack
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20 * num  # an array for each pack would take more than 100 bytes
    assert [len(members), members[num - 1].tolist()] == [num, [num - 1]]


def test_some_pieces_at_a_time_are_submitted_to_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_pool, "_IN_FLIGHT", 10)
    with DaskPool(number=1, address=None, threads=2, piece="number") as pool:
        in_flight, results = [], {}
        for item, result in pool.each(abs, range(-200, 0)):
            in_flight.append(len(pool.client.futures))
            results[item] = result
        assert results == {item: -item for item in range(-200, 0)}
        assert 1 <= max(in_flight) <= 11  # and the one that has just finished
        with pytest.raises(ZeroDivisionError):
            list(pool.each((1).__truediv__, [1, 2, 0, *range(1, 50)]))
        assert not pool.client.futures


def test_draws_are_those_of_torch_without_its_limit() -> None:
    for seed in range(20):
        num = 10 + 97 * seed
        share = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        own, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        expected = torch.multinomial(share, num, replacement=True, generator=other)
        assert torch.equal(draw(share, num, own), expected)
        assert torch.equal(own.get_state(), other.get_state())
    most = 1 << 24  # categories that torch.multinomial takes
    share = torch.zeros(most + 4, dtype=torch.float64)
    share[[3, most, most + 2]] = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    drawn = Counter(draw(share, 20_000, torch.Generator().manual_seed(0)).tolist())
    shares = {index: count / 20_000 for index, count in drawn.items()}
    assert shares == pytest.approx({3: 0.25, most: 0.5, most + 2: 0.25}, abs=0.02)
