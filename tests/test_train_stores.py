"""Stores beside that of the targets: dev losses against exact hidden states, and a stem in a codec of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extract.base.errors import RetortError
from extract.config import ExtractConfig
from extract.run import extract
from extract.store.manifest import Manifest
from tests.train_world import TARGETS, World, make_teacher, make_world, student, train_request
from train.loop import train
from train.metrics import RunMetrics
from train.run import TrainRequest, begin

STORED: dict[str, Any] = {"stem": "stored", "optimiser": {"lr": 3e-3, "stem_grad_scale": 0.0}}


def make_store(world: World, name: str, **changes: Any) -> Path:
    """Extract the world's features again, with other settings, beside its manifest; return the new manifest."""
    manifest = world.manifest.with_name(f"{name}.json")
    settings: dict[str, Any] = {
        "upstream": str(world.teacher),
        "corpus": world.corpus,
        "manifest": manifest,
        "store": world.folder / "stores",
        "layers": TARGETS,
        "codec": "float16",
        "keep": frozenset({"frames", "pooled", "stem"}),
        "pack_frames": 96,
        "initial_blocks": 2,
    }
    extract(ExtractConfig(**settings | changes))
    return manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world in int4, with stores in float16 in other packs, with the stem alone, with fewer layers, and in blocks."""
    world = make_world(tmp_path_factory.mktemp("world"), codec="int4", keep=frozenset({"frames", "pooled", "stem"}))
    make_store(world, "exact", pack_frames=128)
    make_store(world, "stem", keep=frozenset({"pooled", "stem"}), pack_frames=160)
    make_store(world, "blocks", codec="transform:4")
    make_store(world, "layers", layers=(2, 4), keep=frozenset({"frames", "pooled"}))
    return world


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world; outputs of one test lie in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return made


def request(world: World, config: Any, **manifests: str) -> TrainRequest:
    paths = {f"{name}_manifest": world.manifest.with_name(f"{store}.json") for name, store in manifests.items()}
    out = Path.cwd()
    return replace(train_request(world, config), out=out / "student", run_folder=out / "run", **paths)


def weights() -> dict[str, torch.Tensor]:
    return load_file("student/model.safetensors")


@pytest.mark.parametrize(
    ("family", "changes"), [("distilhubert", {}), ("interleaved", STORED), ("gendistiller", STORED)]
)
def test_dev_is_scored_on_the_other_store_and_training_is_left_alone(
    world: World, family: str, changes: dict[str, Any]
) -> None:
    config = student(family, **changes)
    own = train(request(world, config))
    before = weights()
    exact = train(request(world, config, dev="exact"))
    after = weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert exact.loss.train == own.loss.train and exact.loss.dev != own.loss.dev
    assert exact.loss.dev == pytest.approx(own.loss.dev, rel=0.05)  # int4 against float16, stem included
    assert own.dev_teacher is None and exact.teacher == own.teacher
    assert exact.dev_teacher == Manifest.read(world.manifest.with_name("exact.json")).fingerprint
    assert RunMetrics.read(Path("run/metrics.json")).dev_teacher == exact.dev_teacher
    # Dev batches are those of a student that trains from the other store.
    run = begin(request(world, config, dev="exact"))
    alone = begin(replace(request(world, config), manifest=world.manifest.with_name("exact.json")))
    stored = config.stem == "stored"
    for found, expected in zip(
        run.dev_data.dev_batches(stored=stored), alone.data.dev_batches(stored=stored), strict=True
    ):
        assert found.utterances == expected.utterances and torch.equal(found.targets(), expected.targets())
        assert not stored or torch.equal(found.stem()[0], expected.stem()[0])


@pytest.mark.parametrize("micro_frames", [0, 64])
def test_a_stem_of_another_store_is_that_of_its_utterances(world: World, micro_frames: int) -> None:
    changes = STORED | {"optimiser": STORED["optimiser"] | {"micro_frames": micro_frames}}
    run = begin(request(world, student("distilhubert", **changes), stem="stem"))
    other = run.other_stores["stem"]
    batches = [part for pack in run.data.sampler.packs for part in run.data.training_parts(int(pack), stored=True)]
    for batch in [*batches, *run.data.dev_batches(stored=True)]:
        stem_BTC, valid_BT = batch.stem()
        assert batch.samples_BS is None and not stem_BTC[~valid_BT].any()
        for row, index in enumerate(batch.utterances):
            expected_TC = other.stem_at(index)
            np.testing.assert_array_equal(stem_BTC[row, : len(expected_TC)].numpy(), expected_TC)
            assert valid_BT[row].sum() == len(expected_TC)


def test_targets_and_stem_of_two_stores_train_as_those_of_one(world: World) -> None:
    exact = replace(world, manifest=world.manifest.with_name("exact.json"))
    config = student("distilhubert", **STORED)
    together = train(request(exact, config))
    before = weights()
    apart = train(request(exact, config, stem="stem"))
    after = weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert apart.loss == together.loss and apart.dev_by_layer == together.dev_by_layer
    assert apart.stem_teacher == Manifest.read(world.manifest.with_name("stem.json")).fingerprint
    assert together.stem_teacher is None


def test_targets_in_blocks_and_an_exact_stem_are_those_of_the_same_utterances(world: World) -> None:
    """A transform store has other packs than one of float16, and utterances at other rows."""
    blocks = replace(world, manifest=world.manifest.with_name("blocks.json"))
    run = begin(request(blocks, student("distilhubert", **STORED), dev="exact", stem="exact"))
    exact = run.other_stores["dev"]
    errors, powers = [], []
    for batch in (part for pack in run.data.sampler.packs for part in run.data.training_parts(int(pack), stored=True)):
        exact_LFD = np.concatenate([exact.hidden_at(index) for index in batch.utterances], axis=1)
        errors.append(((batch.targets().numpy() - exact_LFD) ** 2).sum())
        powers.append((exact_LFD**2).sum())
        for stem_TC, index in zip(batch.stem()[0], batch.utterances, strict=True):
            expected_TC = exact.stem_at(index)
            np.testing.assert_array_equal(stem_TC[: len(expected_TC)].numpy(), expected_TC)
    assert 1e-6 < sum(errors) / sum(powers) < 0.02  # 4 bits a value, between 17 and 60 dB
    assert all(batch.target_codes.codec == exact.codec_for(TARGETS) for batch in run.dev_data.dev_batches(stored=True))


def test_a_changed_store_starts_a_new_run(world: World) -> None:
    config = student("distilhubert", **STORED)
    keys = [
        begin(request(world, config, **manifests)).key
        for manifests in ({}, {"dev": "exact"}, {"stem": "stem"}, {"stem": "exact"}, {"dev": "exact", "stem": "stem"})
    ]
    assert len(set(keys)) == len(keys)
    assert begin(replace(request(world, config), dev_manifest=world.manifest)).key == keys[0]  # the same store


def test_stores_that_do_not_belong_together_are_refused(world: World, tmp_path: Path) -> None:
    def refused(config: Any, **manifests: str) -> str:
        with pytest.raises(RetortError) as caught:
            begin(request(world, config, **manifests))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    stored = student("distilhubert", **STORED)
    assert "layer 6" in refused(student("distilhubert"), dev="layers")
    assert "frames" in refused(student("distilhubert"), dev="stem")
    assert "not the stem" in refused(student("distilhubert", targets=(2, 4), **STORED), dev="layers")
    assert "not the stem" in refused(stored, stem="layers")
    assert "waveforms" in refused(student("distilhubert"), stem="stem")
    make_store(world, "cut", cut_long=1.0)
    assert "--dev-manifest" in refused(stored, dev="cut") and "16000" in refused(stored, dev="cut")
    retrained = make_teacher(tmp_path / "retrained", hidden_size=16, intermediate_size=24)
    make_store(world, "retrained", upstream=str(retrained))
    assert "--stem-manifest" in refused(stored, stem="retrained") and "weights" in refused(stored, stem="retrained")
    elsewhere = make_world(tmp_path / "elsewhere", longest_s=0.8)
    with pytest.raises(RetortError, match="corpus"):
        begin(replace(request(world, stored), dev_manifest=elsewhere.manifest))
