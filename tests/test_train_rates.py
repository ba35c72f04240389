"""A student has its teacher's frames for any stem of the teacher, or training is refused."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import HubertModel

from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.errors import RetortError
from extract.base.files import sha256_file, write_json
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.run import extract
from extract.store.manifest import initial_weights_path
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from tests.train_world import SHAPE, World, make_world, stop_after, student, teacher_config, train_request
from train import checkpoint
from train.initial_weights import LoadedParts
from train.loop import train
from train.run import begin
from train.stem import STANDARD, StemShape

KERNELS, STRIDES = [10, 3, 3, 3, 3, 2, 2, 2], [5, 2, 2, 2, 2, 2, 2, 2]
SLOW = {"conv_dim": [8] * 8, "conv_kernel": KERNELS, "conv_stride": STRIDES, "num_feat_extract_layers": 8}


def record_stem(manifest: Path, **changes: Any) -> None:
    """Write into a manifest the shape of its teacher's stem, and other changes; None removes a field."""
    value = json.loads(manifest.read_text()) | {"stem": {"conv_kernel": KERNELS, "conv_stride": STRIDES}} | changes
    write_json(manifest, {name: one for name, one in value.items() if one is not None})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose teacher has 25 frames a second; its store keeps the stem."""
    keep = frozenset({"frames", "pooled", "stem"})
    world = make_world(tmp_path_factory.mktemp("world"), keep=keep, codec="float16", changes=SLOW)
    record_stem(world.manifest)
    return world


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose teacher has the standard stem, and blocks that no student computes."""
    return make_world(tmp_path_factory.mktemp("usual"), changes={"hidden_act": "relu"})


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return own(made, tmp_path, monkeypatch)


def own(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world with a new folder and manifest for the outputs of one test."""
    monkeypatch.chdir(folder)
    for file in world.manifest.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return replace(world, folder=folder, manifest=folder / world.manifest.name)


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    return load_file(world.folder / "students" / name / "model.safetensors")


def refused(world: World, **changes: Any) -> str:
    with pytest.raises(RetortError) as caught:
        begin(train_request(world, student("distilhubert", **changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["distilhubert", "interleaved", "gendistiller", "gendistiller-2d"])
def test_a_student_of_25_frames_a_second_has_its_teachers_frames(world: World, family: str) -> None:
    run = begin(train_request(world, student(family)))
    assert run.parts.copied[0] == "stem" and run.data.dev.size
    for batch in [part for pack in run.data.sampler.packs for part in run.data.training_parts(int(pack))]:
        predicted = run.distiller(batch, batch.targets())
        assert all(one.shape == batch.targets()[0].shape for one in predicted)
        for index in batch.utterances:
            waveform_BS = torch.from_numpy(run.corpus.waveform(index))[None]
            assert run.distiller.student(waveform_BS).last_hidden_state.shape[1] == run.store.num_frames[index]


def test_a_saved_slow_student_has_its_teachers_frames(world: World) -> None:
    metrics = train(train_request(world, student("gendistiller", 2)))
    assert metrics.loss.dev > 0
    folder = world.folder / "students" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    assert (config["conv_kernel"], config["conv_stride"], config["conv_dim"]) == (KERNELS, STRIDES, [8] * 8)
    upstream = load_upstream(find_upstream(str(folder)), trust_remote_code=True)
    corpus = Corpus.open(world.corpus)
    found = upstream.hidden_states([corpus.waveform(index) for index in range(len(corpus))], [0])
    theirs = HubertModel(teacher_config(**SLOW))._get_feat_extract_output_lengths(torch.from_numpy(corpus.num_samples))
    expected = StoreReader.open(world.manifest, corpus).num_frames
    assert [one.shape[1] for one in found] == expected.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("kernels", "strides"),
    [
        ([10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 1]),  # 100 Hz
        ([10, 3, 3, 3, 3, 3, 3], [5, 2, 2, 2, 2, 2, 2]),  # 50 Hz with frames of 640 samples
        ([400], [320]),  # the standard frames by one convolution
        ([7, 5, 3], [3, 4, 5]),
    ],
)
def test_frames_are_those_of_the_convolutions_for_every_length(kernels: list[int], strides: list[int]) -> None:
    shape = StemShape(tuple(kernels), tuple(strides))
    first = shape.receptive_samples
    lengths = torch.arange(first, first + 3 * shape.hop_samples)
    config = {"conv_kernel": kernels, "conv_stride": strides, "conv_dim": [8] * len(kernels)}
    teacher = HubertModel(teacher_config(**config, num_feat_extract_layers=len(kernels)))
    theirs = teacher._get_feat_extract_output_lengths(lengths)
    assert theirs.tolist() == ((lengths - first) // shape.hop_samples + 1).tolist()
    assert teacher._get_feat_extract_output_lengths(torch.tensor(first - 1)) == 0


def test_a_student_starts_as_its_slow_teacher(world: World) -> None:
    run = begin(train_request(world, student("distilhubert")))
    assert run.parts.copied == ["stem", "projection", "position", "layer 1", "layer 2"]
    model = HubertModel.from_pretrained(world.teacher).eval()
    waveform_BS = torch.from_numpy(run.corpus.waveform(3))[None]
    with torch.no_grad():
        theirs = model(waveform_BS, output_hidden_states=True).hidden_states[:3]
        found = run.distiller.student.eval()(waveform_BS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)


def test_the_stored_stem_is_the_slow_teachers(world: World) -> None:
    frozen = {"optimiser": {"lr": 1e-3, "stem_grad_scale": 0.0}}
    from_waveforms = train(train_request(world, student("distilhubert", 6, **frozen), "waveforms"))
    read = train(train_request(world, student("distilhubert", 6, **frozen, stem="stored"), "read"))
    assert read.loss.dev == pytest.approx(from_waveforms.loss.dev, rel=2e-3)


def interrupted(world: World, monkeypatch: pytest.MonkeyPatch, family: str) -> Path:
    """Train up to the checkpoint of step 5 and return its file."""
    config = student(family, 8, checkpoint_every_steps=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config, "parts"))
    (path,) = (world.folder / "checkpoints").glob("*/checkpoint.pt")
    return path


def test_a_grown_slow_student_resumed_equals_uninterrupted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student("interleaved", 8, checkpoint_every_steps=1)
    train(train_request(world, config, "whole"))
    interrupted(world, monkeypatch, "interleaved")
    train(train_request(world, config, "parts"))
    expected, found = weights(world, "whole"), weights(world, "parts")
    assert len([name for name in found if name.endswith("conv.weight")]) == 9
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_key_changes_with_everything_that_decides_the_result(world: World) -> None:
    base = {"store_digest": "s", "corpus_digest": "c", "stem": STANDARD, "initial_weights": "i", "other_digests": {}}
    config = student("distilhubert")
    keys = {
        checkpoint.run_key(student("distilhubert", **settings), **base | changes)
        for settings, changes in (
            ({}, {}),
            ({"seed": 1}, {}),
            ({}, {"store_digest": "t"}),
            ({}, {"corpus_digest": "d"}),
            ({}, {"stem": StemShape(tuple(KERNELS), tuple(STRIDES))}),
            ({}, {"initial_weights": None}),
            ({}, {"other_digests": {"codebook": "k"}}),
        )
    }
    assert len(keys) == 7
    more_packs = replace(config, optimiser=replace(config.optimiser, accumulate=4))
    assert checkpoint.run_key(more_packs, **base) == checkpoint.run_key(config, **base)


# ----------------------------------------------------------------------------------- manifests without the stem's shape


def test_a_manifest_without_a_stem_takes_it_from_the_initial_weights(world: World) -> None:
    record_stem(world.manifest, stem=None)
    for init in ("teacher", "random"):
        config = begin(train_request(world, student("distilhubert", init=init))).distiller.student.config
        assert (config.conv_kernel, config.conv_stride) == (KERNELS, STRIDES)
    world.manifest.with_suffix(".initial.safetensors").unlink()
    error = refused(world, init="random")
    assert (
        "720 samples every 640 are not those of the standard stem (400 every 320)" in error
        and "--initial-blocks" in error
    )
    assert "--initial-blocks" in refused(world)


def test_a_manifest_without_a_stem_may_mean_the_standard_one(
    usual: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = own(usual, tmp_path, monkeypatch)
    record_stem(world.manifest, stem=None)
    world.manifest.with_suffix(".initial.safetensors").unlink()
    config = begin(train_request(world, student("distilhubert", init="random"))).distiller.student.config
    assert config.conv_kernel == KERNELS[:7] and config.conv_stride == STRIDES[:7]


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        ({"conv_kernel": KERNELS[:7], "conv_stride": STRIDES[:7]}, "stem: conv_kernel .*720 samples every 640"),
        ({"conv_kernel": KERNELS, "conv_stride": STRIDES[:7]}, "expected lists of equal length"),
        ({"conv_kernel": [], "conv_stride": []}, "expected lists of equal length"),
        ({"conv_kernel": KERNELS, "conv_stride": [0, *STRIDES[1:]]}, "expected lists of equal length"),
        ({"conv_kernel": KERNELS, "conv_stride": [5.0, *STRIDES[1:]]}, "stem.conv_stride: got"),
        ({"conv_kernel": "10", "conv_stride": STRIDES}, "stem.conv_kernel: got '10'"),
        ({"conv_stride": STRIDES}, "`conv_kernel` is missing"),
    ],
)
def test_a_stem_that_does_not_give_the_stores_frames_is_refused(world: World, stem: Any, message: str) -> None:
    record_stem(world.manifest, stem=stem)
    for init in ("teacher", "random"):
        with pytest.raises(RetortError, match=message):
            begin(train_request(world, student("distilhubert", init=init)))


def test_frames_of_another_rate_than_the_manifests_are_refused(world: World) -> None:
    stem = {"conv_kernel": KERNELS[:7], "conv_stride": STRIDES[:7]}
    record_stem(world.manifest, hop_samples=320, receptive_samples=400, stem=stem)
    error = refused(world, init="random")
    assert "utterance-00 has 7 frames there, expected the 14 of a stem" in error


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_filter_banks_have_no_frames_for_a_student(world: World, init: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        extract(
            ExtractConfig(
                upstream="fbank",
                corpus=world.corpus,
                manifest=world.folder / "f.json",
                store=world.folder / "stores",
                pack_frames=96,
            )
        )
    error = refused(replace(world, manifest=world.folder / "f.json"), init=init)
    assert "f.json holds filter banks, which have no convolution stem" in error and "wav2vec 2.0 family" in error


# ------------------------------------------------------------------------------------------------ what a run reports


def test_parts_that_are_not_the_teachers_are_reported(
    usual: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = own(usual, tmp_path, monkeypatch)
    metrics = train(train_request(world, student("distilhubert", 2)))
    assert metrics.from_teacher == ("stem", "projection", "position")
    assert list(metrics.not_from_teacher) == ["layer 1", "layer 2"]
    assert "random initial weights: layer 1, layer 2 (hidden_act is 'relu', the student's 'gelu')" in (
        capsys.readouterr().err
    )
    written = json.loads((world.folder / "runs/tiny/metrics.json").read_text())
    assert written["not_from_teacher"] == metrics.not_from_teacher
    random = train(train_request(world, student("distilhubert", 2, init="random"), "random"))
    assert random.from_teacher == () and random.not_from_teacher == {}


def test_a_resumed_run_reports_the_parts_that_it_started_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = interrupted(world, monkeypatch, "distilhubert")
    value = read_checkpoint(path, format_version=checkpoint.FORMAT_VERSION)
    assert value is not None and value["copied"][0] == "stem" and value["random"] == {}
    write_checkpoint(
        path, value | {"copied": ["stem"], "random": {"projection": "b"}}, format_version=checkpoint.FORMAT_VERSION
    )
    run = begin(train_request(world, student("distilhubert", 8, checkpoint_every_steps=1), "parts"))
    assert run.state.step == 5 and run.parts == LoadedParts(["stem"], {"projection": "b"})


@pytest.mark.parametrize("is_recorded", [True, False])
def test_changed_initial_weights_do_not_resume_an_old_run(
    world: World, monkeypatch: pytest.MonkeyPatch, is_recorded: bool
) -> None:
    file = initial_weights_path(world.manifest)
    if not is_recorded:
        record_stem(world.manifest, initial_weights=None)
    interrupted(world, monkeypatch, "distilhubert")
    config = student("distilhubert", 8, checkpoint_every_steps=1)
    assert begin(train_request(world, config, "parts")).state.step == 5
    tensors = load_file(file)
    tensors["feature_projection.projection.bias"] += 1
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=metadata)
    if is_recorded:  # the manifest refuses a file that is not the recorded one
        with pytest.raises(RetortError, match=rf"{file.name}.*sha256.*--initial-blocks"):
            begin(train_request(world, config, "parts"))
        record = json.loads(world.manifest.read_text())["initial_weights"]
        record_stem(world.manifest, initial_weights=record | {"sha256": sha256_file(file)})
    assert begin(train_request(world, config, "parts")).state.step == 0
    random = student("distilhubert", 8, init="random")
    assert begin(train_request(world, random, "parts")).key == begin(train_request(world, random, "again")).key


def test_a_wider_student_names_the_sizes(world: World) -> None:
    run = begin(train_request(world, student("distilhubert", shape=SHAPE | {"dim": 32})))
    assert run.parts.copied == ["stem"]
    assert "16 x 8, the student's 32 x 8" in run.parts.random["projection"]
