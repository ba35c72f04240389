"""Training without waveforms: the same losses from the stored stem, no audio read, unfrozen and resumed bit for bit."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extract.base.errors import RetortError
from extract.base.validate import parse
from extract.store.codec import CODECS
from tests.train_world import SHAPE, World, make_world, student, train_request
from train.config import StudentConfig
from train.loop import score_dev, train
from train.progress import TrainingProgress
from train.run import begin

FROZEN = {"lr": 3e-3, "stem_grad_scale": 0.0}
STEM = "feature_extractor."


def make(folder: Path, **changes: Any) -> World:
    return make_world(folder, keep=frozenset({"frames", "pooled", "stem"}), **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose store keeps the stem in float16."""
    return make(tmp_path_factory.mktemp("world"), codec="float16")


@pytest.fixture(scope="module")
def transformed(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same in codec `transform`."""
    return make(tmp_path_factory.mktemp("transformed"), codec="transform:2")


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world with a new folder for the outputs of one test."""
    monkeypatch.chdir(tmp_path)
    return replace(made, folder=tmp_path)


def without_audio(world: World) -> World:
    """Return the world with a corpus file that has only the index: reading a sample is an error."""
    path = world.folder / "index.h5"
    with h5py.File(world.corpus, "r") as whole, h5py.File(path, "w") as index:
        index.attrs.update(whole.attrs)
        whole.copy("utterances", index)
    return replace(world, corpus=path)


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    return load_file(world.folder / "students" / name / "model.safetensors")


def losses(world: World, name: str) -> list[float]:
    lines = (world.folder / "runs" / name / "plots/metrics/train/loss.tsv").read_text().splitlines()[1:]
    return [float(line.split()[1]) for line in lines]


@pytest.mark.parametrize("codec", [*CODECS, "transform:2"])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_a_batch_has_the_output_of_the_frozen_stem(tmp_path: Path, codec: str, do_normalize: bool) -> None:
    world = make(tmp_path, codec=codec, do_normalize=do_normalize)
    run = begin(train_request(world, student("distilhubert", optimiser=FROZEN)))
    worst = json.loads(world.manifest.read_text())["codec_error"]["stem"]["max_abs_error"]
    data = run.data
    pairs = [
        [batch for stored in (False, True) for batch in data.training_parts(int(pack), stored=stored)]
        for pack in data.sampler.packs
    ]
    pairs += zip(data.dev_batches(), data.dev_batches(stored=True), strict=True)
    for from_waveforms, read in pairs:
        assert (
            read.samples_BS is None
            and from_waveforms.stem_codes is None
            and from_waveforms.utterances == read.utterances
        )
        expected_BTC, valid_BT = run.distiller.stem(from_waveforms)
        stem_BTC, same_BT = run.distiller.stem(read)
        assert torch.equal(valid_BT, same_BT) and stem_BTC.shape == expected_BTC.shape
        assert (stem_BTC - expected_BTC)[valid_BT].abs().max() <= worst * 1.001 + 1e-5
        assert not stem_BTC[~valid_BT].any()
        assert torch.equal(from_waveforms.targets(), read.targets())


@pytest.mark.parametrize("family", ["distilhubert", "interleaved", "gendistiller"])
def test_losses_are_those_from_waveforms(world: World, family: str) -> None:
    changes = {"optimiser": FROZEN | {"accumulate": 2}, "log_every": 1, "init": "teacher"}
    from_waveforms = train(train_request(world, student(family, 12, **changes), "waveforms"))
    read = train(train_request(world, student(family, 12, **changes, stem="stored"), "read"))
    # float16 keeps eleven bits of a stem's value; twelve steps increase the difference a little.
    assert losses(world, "read") == pytest.approx(losses(world, "waveforms"), rel=2e-3)
    assert len(set(losses(world, "read"))) == 12
    assert read.loss.dev == pytest.approx(from_waveforms.loss.dev, rel=2e-3)
    assert from_waveforms.loss.dev_stored_stem is None
    assert read.loss.dev_stored_stem == read.loss.dev != from_waveforms.loss.dev  # a stem that never trains
    seed = load_file(world.manifest.with_suffix(".initial.safetensors"))
    saved = weights(world, "read")
    assert all(torch.equal(saved[name], seed[name]) for name in seed if name.startswith(STEM))


@pytest.mark.parametrize("family", ["distilhubert", "gendistiller"])
def test_an_index_without_audio_gives_the_same_student(world: World, family: str) -> None:
    config = student(family, 6, optimiser=FROZEN, stem="stored")
    alone = train(train_request(without_audio(world), config, "alone"))
    whole = train(train_request(world, config, "whole"))
    expected, found = weights(world, "whole"), weights(world, "alone")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert alone.loss == whole.loss and alone.loss.dev is not None
    assert (alone.dev_by_layer, alone.exposure_bias) == (whole.dev_by_layer, whole.exposure_bias)


def test_dev_scores_are_those_of_the_stored_stem(world: World) -> None:
    """The score of a new student is the loss of its own forward pass on stems that are read one by one."""
    run = begin(train_request(world, student("distilhubert", optimiser=FROZEN, stem="stored", dev_every=99)))
    read, weights_of = [], []
    run.distiller.eval()
    for index in run.corpus.select("dev"):
        stem_1TC = torch.from_numpy(run.store.stem_at(int(index)))[None]
        targets_LTD = torch.from_numpy(run.store.hidden_at(int(index), run.data.layers))
        with torch.no_grad():
            last_TD = run.distiller.student(stem_features=stem_1TC).last_hidden_state[0]
            inner = torch.nn.functional.gelu(run.distiller.heads["shared"](last_TD)).chunk(3, dim=-1)
            predicted = [head(part) for head, part in zip(run.distiller.heads["split"], inner, strict=True)]
            read.append(run.distiller.loss(predicted, targets_LTD).item())
        weights_of.append(targets_LTD.shape[1])
    assert score_dev(run).loss == pytest.approx(np.average(read, weights=weights_of), rel=1e-5)


def test_the_loss_of_a_coarse_codec_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.loop._NOTICEABLE", 0.0)
    world = make(tmp_path, codec="int4")
    config = student("distilhubert", 20, optimiser=FROZEN, stem="stored")
    metrics = train(train_request(world, config, "coarse"))
    line = re.search(r"dev loss ([\d.]+) from waveforms, ([\d.]+) from the stored stem", capsys.readouterr().err)
    assert line is not None
    from_waveforms, stored = map(float, line.groups())
    assert stored == round(metrics.loss.dev, 4)
    assert from_waveforms != stored
    train(train_request(without_audio(world), config, "index-only"))
    assert "from waveforms" not in capsys.readouterr().err


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise in a run once `steps` steps are done."""
    show: Callable[..., None] = TrainingProgress.advance

    def shown(self: TrainingProgress, **values: Any) -> None:
        show(self, **values)
        if self.bar.done == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "advance", shown)


# Eight steps, unfrozen at 6, interleaved grown at 2, 4 and 6. A run that stops at step n resumes from step n - 1:
# before the stem trains, right then, and after it.
@pytest.mark.parametrize(
    ("codec", "family", "stop"),
    [
        ("float16", "distilhubert", 6),
        ("float16", "distilhubert", 7),
        ("float16", "interleaved", 8),
        ("transform", "interleaved", 6),
        ("transform", "gendistiller", 7),
    ],
)
def test_unfrozen_and_resumed_equals_uninterrupted(
    world: World, transformed: World, monkeypatch: pytest.MonkeyPatch, codec: str, family: str, stop: int
) -> None:
    if codec == "transform":
        world = replace(transformed, folder=world.folder)
    settings = {"lr": 1e-3, "accumulate": 2, "stem_grad_scale": 0.5, "stem_frozen": 0.75}
    config = student(family, 8, optimiser=settings, stem="stored", checkpoint_every_steps=1)
    whole = train(train_request(world, config, "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config, "parts"))
    run = begin(train_request(world, config, "parts"))
    assert run.state.step == stop - 1
    assert run.distiller.stem_trains == (stop - 1 > 6)
    parts = train(train_request(world, config, "parts"))
    expected, found = weights(world, "whole"), weights(world, "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(world, "whole") == losses(world, "parts")
    assert whole.loss == parts.loss and whole.loss.dev_stored_stem is not None


def test_an_unfrozen_stem_learns_and_only_then(world: World) -> None:
    seed = load_file(world.manifest.with_suffix(".initial.safetensors"))
    changes = {"stem_grad_scale": 1.0, "stem_frozen": 0.75}
    for source in ("stored", "waveforms"):
        config = student("distilhubert", 8, optimiser={"lr": 1e-3} | changes, stem=source, log_every=1)
        assert config.stem_trains_from == 6
        train(train_request(world, config, source))
    saved = weights(world, "stored")
    assert not any(torch.equal(saved[name], seed[name]) for name in seed if name.startswith(STEM))
    # With waveforms in all steps the student is the same except for the codec.
    assert losses(world, "stored") == pytest.approx(losses(world, "waveforms"), rel=2e-3)
    other = weights(world, "waveforms")
    for name in saved:
        if name.startswith(STEM):  # two steps of AdamW move a weight by at most two learning rates
            torch.testing.assert_close(saved[name], other[name], atol=4e-4, rtol=0)


def test_the_optimiser_gets_the_stem_when_it_is_unfrozen(world: World) -> None:
    frozen = begin(train_request(world, student("distilhubert", optimiser={"stem_frozen": 0.5}, stem="stored")))
    warm = begin(train_request(world, student("distilhubert")))

    def count(run: Any) -> int:
        return sum(parameter.numel() for group in run.optimiser.param_groups for parameter in group["params"])

    stem = sum(parameter.numel() for parameter in frozen.distiller.student.feature_extractor.parameters())
    assert count(frozen) == count(warm) - stem
    from train.run import unfreeze_stem

    unfreeze_stem(frozen)
    assert count(frozen) == count(warm)


def one_line(world: World, config: StudentConfig) -> str:
    with pytest.raises(RetortError) as caught:
        begin(train_request(world, config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_store_and_a_student_that_do_not_fit(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    stored = {"stem": "stored", "optimiser": FROZEN}
    plain = make_world(tmp_path_factory.mktemp("plain"))
    error = one_line(plain, student("distilhubert", **stored))
    assert "keeps frames, pooled" in error and "--keep frames,pooled,stem" in error
    error = one_line(world, student("distilhubert", **stored, shape=SHAPE | {"stem_channels": 4}))
    assert "shape.stem_channels: got 4" in error and "8 channels" in error
    assert "stem does not fit" in one_line(
        world, student("distilhubert", **stored, shape=SHAPE | {"stem_norm": "layer"})
    )


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"dev_split": None}, "stem: `waveforms` needs"),
        ({"stem": "stored", "optimiser": {"stem_frozen": 0.5}, "dev_split": None}, "optimiser.stem_frozen: the last"),
    ],
)
def test_waveforms_that_are_needed_and_missing(world: World, changes: dict[str, Any], setting: str) -> None:
    error = one_line(without_audio(world), student("distilhubert", **changes))
    assert error.startswith(setting) and "index.h5" in error
    assert "`stem: stored`" in error and "--keep frames,pooled,stem" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "stored"}, "stem: `stored`.*optimiser.stem_grad_scale"),
        ({"stem": "stored", "optimiser": {"stem_frozen": 0.01}}, "stem: `stored`.*optimiser.stem_frozen"),
        (
            {"stem": "stored", "init": "random", "optimiser": {"stem_frozen": 0.5}},
            "init: got `random`.*`teacher`",
        ),
        ({"init": "stem", "light_stem": "light"}, "init: got `stem`.*light_stem.*`random`"),
        ({"stem": "kept"}, "test.stem 'kept': expected one of stored, waveforms"),
        ({"optimiser": {"stem_frozen": 1.0}}, "stem_frozen: got 1 .*below 1"),
        ({"optimiser": {"stem_frozen": 0.5, "stem_grad_scale": 0}}, "stem_frozen: got 0.5 .stem_grad_scale 0."),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RetortError, match=message) as caught:
        parse(StudentConfig, {"family": "distilhubert", "steps": 10, "shape": SHAPE} | changes, where="test")
    assert "\n" not in str(caught.value)


def test_positions_decide_what_a_batch_is_made_of(world: World) -> None:
    """Two packs per step, unfrozen at step 3: the first six draws are stored, from any start."""
    settings = {"accumulate": 2, "stem_frozen": 0.5}
    run = begin(train_request(world, student("distilhubert", 6, optimiser=settings, stem="stored")))
    for position in (0, 5, 7):
        batches = run.data.training_batches(position)
        kinds = [batch.samples_BS is None for [batch] in islice(batches, 4)]
        batches.close()
        assert kinds == [draw < 6 for draw in range(position, position + 4)]
    assert np.isinf(student("distilhubert", optimiser=FROZEN).stem_trains_from)
