"""Batches on a CUDA device without a driver: one device, no wait of the host. Waveforms on a CPU: their bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from extract.corpus import Corpus, normalise_waveform
from extract.store.codec import CODECS
from extract.store.manifest import KEEP
from extract.store.reader import StoreReader
from tests.fake_cuda import CUDA, fake_cuda
from tests.train_world import TARGETS, World, make_world
from train.data import Batch, DistillationData


def data_of(world: World, **changes: object) -> DistillationData:
    corpus = Corpus.open(world.corpus)
    settings = {"layers": TARGETS, "train_splits": ("train",), "dev_split": "dev", "seed": 0}
    return DistillationData(corpus, StoreReader.open(world.manifest, corpus), **settings | changes)


def tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch._each(keep)
    return found


def test_a_batch_is_made_ready_on_the_device_without_a_wait(tmp_path: Path) -> None:
    for codec in (*CODECS, "transform:2"):
        world = make_world(tmp_path / codec, do_normalize=True, codec=codec, keep=KEEP)
        data = data_of(world, micro_frames=40)
        pack = int(data.sampler.packs[0])
        batches = [
            *data.training_parts(pack),
            *data.training_parts(pack, stored=True),
            next(data.dev_batches()),
            next(data.dev_batches(stored=True)),
        ]
        with fake_cuda() as waits:
            moved = [batch.to(CUDA) for batch in batches]
            moved[0].targets()
            moved[-1].stem()
            if data.codec.needs_fit:  # its parameters are on the device now
                waits.clear()
            for batch, there in zip(batches, moved, strict=True):
                assert {tensor.device for tensor in tensors(there)} == {CUDA}
                num_frames = len(batch.rows_F)
                assert there.targets().shape == (3, num_frames, 16) and there.targets().device == CUDA
                if batch.samples_BS is None:
                    stem_BTC, valid_BT = there.stem()
                    assert stem_BTC.device == valid_BT.device == CUDA and stem_BTC.shape[2] == 8
                else:
                    waveforms_BS = there.waveforms()
                    assert waveforms_BS.device == CUDA and waveforms_BS.dtype == torch.float32
                    assert waveforms_BS.shape == batch.samples_BS.shape
            assert waits == []


@pytest.mark.parametrize("normalise", [True, False])
def test_waveforms_have_the_bits_of_the_corpus(tmp_path: Path, normalise: bool) -> None:
    data = data_of(make_world(tmp_path, do_normalize=normalise))
    for _ in range(2):  # the second time with statistics that were kept
        for batch in [*data.training_parts(int(data.sampler.packs[0])), *data.dev_batches()]:
            expected_BS = np.zeros(batch.samples_BS.shape, dtype=np.float32)
            for row, index in enumerate(batch.utterances):
                waveform = data.corpus.waveform(index)
                expected_BS[row, : len(waveform)] = normalise_waveform(waveform) if normalise else waveform
            found_BS = batch.waveforms()
            assert found_BS.numpy().tobytes() == expected_BS.tobytes()  # signs of zeros, too


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("codec", [*CODECS, "transform:2"])
def test_batches_on_a_gpu_have_the_values_of_a_cpu(tmp_path: Path, codec: str) -> None:
    world = make_world(tmp_path, do_normalize=True, codec=codec, keep=KEEP)
    here, there = (data_of(world, micro_frames=40, stored_draws=3) for _ in range(2))
    device = torch.device("cuda")
    near = {"rtol": 0, "atol": 1e-4 if here.codec.needs_fit else 0}  # the rounding of matrix products
    pairs = zip(here.training_batches(0), there.training_batches(0, device=device), strict=False)
    for _, (expected, found) in zip(range(12), pairs, strict=False):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other.targets().cpu(), one.targets(), **near)
            if one.samples_BS is None:
                for a, b in zip(one.stem(), other.stem(), strict=True):
                    torch.testing.assert_close(b.cpu(), a, **near)
            else:
                assert torch.equal(one.waveforms(), other.waveforms().cpu())
    for one, other in zip(here.dev_batches(), there.dev_batches(device=device), strict=True):
        torch.testing.assert_close(other.targets().cpu(), one.targets(), **near)
