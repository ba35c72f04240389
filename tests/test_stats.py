"""Statistics of a store equal numpy's on the whole matrix in memory, without the padding, in bounded memory."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.stats import NEAR_DEAD, hidden_array, measure
from extract.store.reader import StoreReader
from tests.evaluate_stores import Hidden, make_corpus, make_store

DIM = 24


def correlated(seed: int = 0) -> Hidden:
    """Three layers, each a mixture of the one before and of something new; far off zero, one feature nearly dead."""
    mixing = np.random.default_rng(seed).normal(size=(2, DIM, DIM)) / np.sqrt(DIM)

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        generator = np.random.default_rng([seed, index])
        first_TD = generator.normal(size=(frames, DIM)) * np.linspace(0.5, 3, DIM)
        second_TD = first_TD @ mixing[0] + generator.normal(size=(frames, DIM))
        third_TD = second_TD @ mixing[1] + 2 * generator.normal(size=(frames, DIM))
        third_TD[:, 5] *= 1e-4
        return np.stack([first_TD + 30, second_TD - 5, third_TD]).astype(np.float32)

    return hidden


def store(folder: Path, codec: str, *, num: int = 40) -> StoreReader:
    frames = np.random.default_rng(1).integers(5, 60, num).tolist()
    card = make_corpus(folder, labels={}, splits=["train"] * num, num_frames=frames)
    return StoreReader.open(make_store(folder, card, correlated(), codec=codec))


def gram_cka(one_ND: NDArray[np.float64], other_ND: NDArray[np.float64]) -> float:
    """Linear CKA in its other form, HSIC of the N x N Gram matrices centred on both sides (equation 3 with 5)."""
    centre_NN = np.eye(len(one_ND)) - 1 / len(one_ND)
    one_NN, other_NN = (centre_NN @ values @ values.T @ centre_NN for values in (one_ND, other_ND))
    return float((one_NN * other_NN).sum() / np.sqrt((one_NN**2).sum() * (other_NN**2).sum()))


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_statistics_equal_numpys_on_the_whole_matrix(tmp_path: Path, codec: str) -> None:
    reader = store(tmp_path, codec)
    found = measure(reader)
    whole_LND = np.concatenate([reader.hidden(name) for name in reader.ids], axis=1).astype(np.float64)
    assert found.num_frames == whole_LND.shape[1] < reader.num_packs * reader.pack_frames  # there is padding
    assert found.num_packs == reader.num_packs > 4
    for layer_ND, one in zip(whole_LND, found.by_layer, strict=True):
        std_D = layer_ND.std(axis=0)
        assert one.mean_norm == pytest.approx(np.linalg.norm(layer_ND, axis=1).mean(), rel=1e-5)
        assert one.std_mean == pytest.approx(std_D.mean(), rel=1e-5)
        assert one.std_std == pytest.approx(std_D.std(), rel=1e-5)
        assert one.near_dead_share == (std_D <= NEAR_DEAD * std_D.mean()).mean()
    assert [one.near_dead_share for one in found.by_layer] == [0, 0, 1 / DIM]
    expected_LL = [[gram_cka(one, other) for other in whole_LND] for one in whole_LND]
    np.testing.assert_allclose(found.cka_LL, expected_LL, rtol=1e-5)
    assert 0.1 < found.cka_LL[0, 2] < found.cka_LL[0, 1] < 0.9  # neither blind nor trivial


def test_padding_would_change_every_number(tmp_path: Path) -> None:
    """Padding changes the statistics of the same store, so the test above fails if padding is included."""
    reader = store(tmp_path, "float16")
    found = measure(reader)
    padded_LND = np.concatenate([reader.pack(pack).codes_LRW for pack in range(reader.num_packs)], axis=1)
    padded_LND = padded_LND.astype(np.float64)
    assert padded_LND.shape[1] > 1.05 * found.num_frames
    assert abs(gram_cka(padded_LND[0], padded_LND[1]) - found.cka_LL[0, 1]) > 0.05
    assert np.linalg.norm(padded_LND[0], axis=1).mean() < 0.95 * found.by_layer[0].mean_norm


def test_the_array_is_lazy_and_every_chunk_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = store(tmp_path, "int8")
    read: list[tuple[int, int]] = []
    pack = StoreReader.pack

    def counting(self: StoreReader, index: int, layers: list[int]) -> object:
        read.append((index, *layers))
        return pack(self, index, layers)

    monkeypatch.setattr(StoreReader, "pack", counting)
    lazy = hidden_array(reader, range(reader.num_packs))
    assert not read
    assert lazy.chunks[0] == (1, 1, 1)
    assert lazy.shape == (3, int(reader.num_frames.sum()), DIM)
    assert lazy[1, :3].compute().shape == (3, DIM)
    assert read == [(0, 1)]
    read.clear()
    measure(reader)
    pivot = [(0, layer) for layer in range(3)]
    assert sorted(read) == sorted(pivot + [(index, layer) for index in range(reader.num_packs) for layer in range(3)])


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    def peak(num: int) -> int:
        folder = tmp_path / str(num)
        folder.mkdir()
        card = make_corpus(folder, labels={}, splits=["train"] * num, num_frames=[2_000] * num)
        wide = np.random.default_rng(0).normal(size=(2, 2_000, 64)).astype(np.float32)
        reader = StoreReader.open(make_store(folder, card, lambda index, frames: wide, codec="int8", pack_frames=2_048))
        tracemalloc.start()
        measure(reader)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # what the first call imports and caches
    shard = 2 * 2 * 2_000 * 64 * 4  # bytes of its frames in float32
    few, many = peak(4), peak(40)  # 2 shards and 20
    assert few > shard
    # Threads that happen to hold two packs at once make some difference, a store ten times the size next to none.
    assert many < few + 2 * shard


def test_some_packs_stand_for_all_lengths(tmp_path: Path) -> None:
    reader = store(tmp_path, "int8")
    some = measure(reader, max_packs=2)
    assert some.num_packs == 2
    chosen = [reader.num_packs // 4, reader.num_packs * 3 // 4]
    assert some.num_frames == sum(reader.num_frames[reader.utterances_of(pack)].sum() for pack in chosen)
    assert measure(reader, max_packs=1_000).num_packs == reader.num_packs
    with pytest.raises(RetortError, match="--max-packs 0"):
        measure(reader, max_packs=0)


def test_the_command_prints_and_writes_the_same_bytes_again(tmp_path: Path) -> None:
    reader = store(tmp_path, "int8")
    arguments = ["stats", str(reader.source), "--out", str(tmp_path / "stats" / "mine")]
    names = ["mine-cka.png", "mine-cka.svg", "mine-layers.png", "mine-layers.svg", "mine.json"]

    def run() -> dict[str, bytes]:
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert "CKA last" in done.output
        return {path.name: path.read_bytes() for path in sorted((tmp_path / "stats").iterdir())}

    first = run()
    assert list(first) == names
    assert first["mine-cka.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["mine-layers.svg"]
    value = json.loads(first["mine.json"])
    assert value["store_digest"] == reader.digest
    assert value["linear_cka"][1][1] == pytest.approx(1)
    assert value["layers"]["0"]["mean_norm"] > 100
    assert run() == first


def test_a_layer_that_never_varies_has_no_likeness(tmp_path: Path) -> None:
    card = make_corpus(tmp_path, labels={}, splits=["train"] * 6, num_frames=[40] * 6)
    full = correlated()

    def hidden(index: int, frames: int) -> NDArray[np.float32]:
        states_LTD = full(index, frames)
        states_LTD[1] = 0
        return states_LTD

    found = measure(StoreReader.open(make_store(tmp_path, card, hidden)))
    assert np.isnan(found.cka_LL[1]).all()
    assert found.by_layer[1].near_dead_share == 1
    assert found.to_dict()["linear_cka"][0][1] is None


def test_a_store_without_frames_is_one_line(tmp_path: Path) -> None:
    card = make_corpus(tmp_path, labels={}, splits=["train"] * 6, num_frames=[40] * 6)
    manifest = make_store(tmp_path, card, correlated(), keep=["pooled"])
    command = [sys.executable, "-m", "extract", "stats", str(manifest)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "no frames; extract with --keep" in done.stderr
    assert done.stderr.count("\n") == 1
