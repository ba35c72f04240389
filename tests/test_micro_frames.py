"""Parts of packs: whole utterances in order, the mean and gradients of the whole pack, in less memory."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from extract.base.errors import RetortError
from extract.base.validate import parse
from extract.store.manifest import KEEP
from tests.train_world import SHAPE, World, make_world, stop_after, student, train_request
from train.config import StudentConfig
from train.data import Batch
from train.loop import train
from train.losses import Distiller
from train.run import Run, begin

FEW = 40  # frames: a pack of the world, of 96, is three or four parts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), do_normalize=True, keep=KEEP)


def run_of(world: World, family: str, **changes: Any) -> Run:
    shape = {"dropout": 0.0, "attention_dropout": 0.0}
    whole = student(family).shape
    sizes = {name: getattr(whole, name) for name in SHAPE}
    return begin(train_request(world, student(family, shape=sizes | shape, **changes)))


def gradients(distiller: Distiller, parts: tuple[Batch, ...], *, forced: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a pack and its gradients by parameter."""
    distiller.zero_grad()
    total = 0.0
    for part in parts:
        targets = part.targets()
        loss = part.share * distiller.loss(distiller(part, targets, forced), targets)
        loss.backward()
        total += loss.item()
    return total, {name: one.grad.clone() for name, one in distiller.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("stored", [False, True])
def test_parts_hold_the_pack_once_and_in_order(world: World, stored: bool) -> None:
    data = run_of(world, "distilhubert").data
    for pack in data.sampler.packs.tolist():
        data.micro_frames = 0
        [whole] = data.training_parts(pack, stored=stored)
        data.micro_frames = FEW
        parts = data.training_parts(pack, stored=stored)
        assert whole.share == 1.0 and sum(part.share for part in parts) == pytest.approx(1.0)
        assert [index for part in parts for index in part.utterances] == list(whole.utterances)
        assert sum(part.duration_s for part in parts) == pytest.approx(whole.duration_s)
        assert torch.equal(torch.cat([part.targets() for part in parts], dim=1), whole.targets())
        for part in parts:
            lengths = data.store.num_frames[list(part.utterances)]
            assert len(lengths) == 1 or len(lengths) * lengths.max() <= FEW
            assert len(part.rows_F) == lengths.sum() == pytest.approx(part.share * len(whole.rows_F))
            if not stored:  # padded to its own longest
                assert part.waveforms().shape[1] == data.corpus.num_samples[list(part.utterances)].max()
        # No part could have taken the first utterance of the next one.
        for part, after in pairwise(parts):
            joined = data.store.num_frames[[*part.utterances, after.utterances[0]]]
            assert len(joined) * joined.max() > FEW


@pytest.mark.parametrize(
    ("family", "forced"),
    [
        ("distilhubert", False),
        ("layerwise", False),
        ("interleaved", False),
        ("gendistiller", False),
        ("gendistiller", True),
        ("gendistiller-2d", False),
        ("gendistiller-2d", True),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_pack(world: World, family: str, forced: bool) -> None:
    run = run_of(world, family)
    pack = int(max(run.data.sampler.packs))  # the shortest utterances: three parts
    loss, expected = gradients(run.distiller, run.data.training_parts(pack), forced=forced)
    run.data.micro_frames = FEW
    parts = run.data.training_parts(pack)
    assert len({part.share for part in parts}) == 3, "parts must differ in size"
    other, found = gradients(run.distiller, parts, forced=forced)
    assert other == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_training_in_parts_resumes_bit_for_bit(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"lr": 1e-3, "micro_frames": FEW, "accumulate": 2, "stem_frozen": 0.5}
    config = student("distilhubert", 6, optimiser=settings, stem="stored", checkpoint_every_steps=1)
    expected = train(train_request(world, config, "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        train(train_request(world, config, "killed"))
    resumed = train(train_request(world, config, "killed"))
    files = [world.folder / "students" / name / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed.loss == expected.loss and np.isfinite(expected.loss.train)


def test_a_run_resumes_in_smaller_parts(world: World) -> None:
    whole, cut = (run_of(world, "distilhubert", optimiser={"micro_frames": few}) for few in (0, FEW))
    assert whole.checkpoint == cut.checkpoint and cut.data.micro_frames == FEW


@pytest.mark.parametrize("value", [-1, 0.5, "many"])
def test_nonsense_is_refused(value: object) -> None:
    section = {"family": "distilhubert", "steps": 10, "shape": SHAPE, "optimiser": {"micro_frames": value}}
    with pytest.raises(RetortError, match="micro_frames") as caught:
        parse(StudentConfig, section, where="test")
    assert "\n" not in str(caught.value)
