"""Batches: waveforms with their own frames, no dev utterance in training, order as a function of position."""

import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.codec import CODECS
from extract.store.reader import StoreReader
from tests.train_world import TARGETS, World, make_world
from train.data import DistillationData, PackSampler
from train.read_ahead import read_ahead


@pytest.fixture(scope="module", params=[*CODECS, "transform:2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), do_normalize=True, codec=request.param)


def data_of(world: World, **changes: object) -> DistillationData:
    corpus = Corpus.open(world.corpus)
    settings = {"layers": TARGETS, "train_splits": ("train",), "dev_split": "dev", "seed": 0}
    return DistillationData(corpus, StoreReader.open(world.manifest, corpus), **settings | changes)


@pytest.mark.parametrize("micro_frames", [0, 40])
def test_batches_hold_an_utterance_and_its_own_features(world: World, micro_frames: int) -> None:
    data = data_of(world, layers=(6, 2), micro_frames=micro_frames)
    rounding = 1e-5 if data.codec.needs_fit else 0  # of matrix products
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(world.teacher)
    batches = [part for pack in data.sampler.packs for part in data.training_parts(int(pack))] + list(
        data.dev_batches()
    )
    for batch in batches:
        waveforms_BS, targets, first = batch.waveforms(), batch.targets(), 0
        width = (waveforms_BS.shape[1] - 400) // 320 + 1
        for row, index in enumerate(batch.utterances):
            length = int(batch.num_samples_B[row])
            expected = extractor(data.corpus.waveform(index), sampling_rate=16_000).input_values[0]
            np.testing.assert_allclose(waveforms_BS[row, :length], expected, atol=1e-5)
            assert not waveforms_BS[row, length:].any()
            hidden = data.store.hidden(data.corpus.ids[index], (6, 2))
            mine = slice(first, first + hidden.shape[1])
            np.testing.assert_allclose(targets[:, mine], hidden, rtol=0, atol=rounding)
            assert batch.rows_F[mine].tolist() == [row * width + frame for frame in range(hidden.shape[1])]
            first += hidden.shape[1]
        assert first == targets.shape[1] == len(batch.rows_F)


def test_codes_stay_as_stored_until_they_are_decoded(world: World) -> None:
    data = data_of(world)
    [batch], codec = data.training_parts(0), data.store.codec
    num_rows = sum(map(codec.num_rows, data.store.num_frames[list(batch.utterances)].tolist()))
    assert batch.target_codes.codes_LRW.numpy().dtype == codec.dtype
    assert batch.target_codes.codes_LRW.shape == codec.codes_shape(3, num_rows * codec.block_frames, 16)
    assert batch.targets().dtype == torch.float32 and batch.targets().shape == (3, len(batch.rows_F), 16)


def test_dev_utterances_are_in_no_training_batch(world: World) -> None:
    data = data_of(world)
    dev = set(data.corpus.select("dev").tolist())
    mixed = [set(data.store.utterances_of(pack).tolist()) for pack in range(data.store.num_packs)]
    assert any(dev & pack and pack - dev for pack in mixed), "the world must mix splits in a pack"
    batches = islice(data.training_batches(0), 3 * len(data.sampler))
    seen = [index for [batch] in batches for index in batch.utterances]
    assert not dev & set(seen)
    assert sorted(seen) == sorted(data.corpus.select("train").tolist() * 3)
    assert {index for batch in data.dev_batches() for index in batch.utterances} == dev


def test_dev_batches_hold_at_most_a_pack(world: World) -> None:
    data = data_of(world)
    for batch in data.dev_batches():
        frames = (batch.samples_BS.shape[1] - 400) // 320 + 1
        assert len(batch.utterances) * frames <= data.store.pack_frames


def test_unknown_splits_and_no_training_utterances(world: World) -> None:
    with pytest.raises(RetortError, match="no split 'test'; it has dev, train; set `dev_split: null`"):
        data_of(world, dev_split="test")
    assert len(data_of(world, dev_split=None).dev) == 0


def test_any_position_resumes_as_if_uninterrupted() -> None:
    sampler = PackSampler(range(7), seed=3)
    whole = list(islice(sampler.from_position(0), 40))
    for position in range(30):
        assert list(islice(sampler.from_position(position), 10)) == whole[position : position + 10]
    epochs = [whole[start : start + 7] for start in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({*map(tuple, epochs)}) > 1
    assert list(islice(PackSampler(range(7), seed=4).from_position(0), 40)) != whole


def test_read_ahead_keeps_order_ends_and_leaves_no_thread() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    ahead = read_ahead(items())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    assert len(made) <= 3 + 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    assert list(read_ahead(iter(range(5)))) == list(range(5))


def test_read_ahead_raises_where_the_item_is_returned() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
