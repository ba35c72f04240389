"""Whole runs on a tiny world: resumption, initial weights, errors, the command."""

import copy
import filecmp
import json
import math
import shutil
import signal
import time
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from extract.base.errors import RetortError
from extract.base.machine import processor_model
from extract.base.provenance import Provenance
from tests.processes import Command, run_command
from tests.train_world import SHAPE, World, make_world, stop_after, student, train_request
from train import checkpoint
from train.__main__ import main
from train.config import StudentConfig
from train.growth import grow_mapping
from train.loop import train
from train.losses import HeadDistiller
from train.metrics import DevPoint, RunMetrics
from train.optimiser import STACK, read_state
from train.run import Run, begin, stage_at
from train.step import collect, draws_forcing, train_step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose teacher is gone."""
    world = make_world(tmp_path_factory.mktemp("world"))
    shutil.rmtree(world.teacher)
    return world


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return the world with a new folder for the outputs of one test."""
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, made.corpus, made.manifest, made.teacher)


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    return load_file(world.folder / "students" / name / "model.safetensors")


def curves(world: World, name: str) -> dict[str, str]:
    root = world.folder / "runs" / name / "plots" / "metrics"
    return {file.relative_to(root).as_posix(): file.read_text() for file in root.rglob("*.tsv")}


# Eight steps; interleaved grows at 2, 4 and 6. A run that stops at step n resumes from the last checkpoint; with one
# per step that is n - 1, so that runs resume just before and just after a growth.
@pytest.mark.parametrize(
    ("family", "every", "stops", "changes"),
    [
        ("interleaved", 1, [3, 4], {}),
        ("interleaved", 3, [2, 8], {}),
        ("gradual", 3, [4], {"growth": {"clones": "identity"}}),
        ("gendistiller", 3, [4, 7], {}),
        ("gendistiller", 1, [4, 5], {"generation": {"grow_from": 1}, "shape": SHAPE | {"layers": 2}}),
        ("gendistiller-2d", 3, [4], {}),
        ("distilhubert", 1, [5], {}),
    ],
)
def test_resumed_equals_uninterrupted(
    world: World, monkeypatch: pytest.MonkeyPatch, family: str, every: int, stops: list[int], changes: dict[str, Any]
) -> None:
    average = 0.9 if every == 3 else 0.0
    config = student(
        family, 8, checkpoint_every_steps=every, optimiser={"lr": 1e-3, "accumulate": 2, "ema": average}, **changes
    )
    whole = train(train_request(world, config, "whole"))
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                train(train_request(world, config, "parts"))
        assert not (world.folder / "students" / "parts").exists()
    parts = train(train_request(world, config, "parts"))
    expected, found = weights(world, "whole"), weights(world, "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert curves(world, "whole") == curves(world, "parts")
    for name in ("loss", "dev_by_layer", "growth", "epochs", "exposure_bias"):
        assert getattr(whole, name) == getattr(parts, name)
    points = [[replace(point, seconds=0) for point in metrics.dev_curve] for metrics in (whole, parts)]
    assert points[0] == points[1] and points[0][-1] == DevPoint(8, 0, whole.loss.dev, whole.dev_by_layer)
    assert not list((world.folder / "checkpoints").iterdir())


def test_the_average_of_weights_follows_its_formula_through_growth(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student("interleaved", 8, checkpoint_every_steps=1, optimiser={"lr": 1e-2, "ema": 0.75})
    kept: list[checkpoint.Checkpoint] = []
    first = begin(train_request(world, config))
    assert first.average is not None
    average = copy.deepcopy(first.average.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda path, value: kept.append(copy.deepcopy(value)))
        scored = train(train_request(world, config))
    assert [one.depth for one in kept] == [3, 3, 6, 6, 9, 9, 12, 12]
    for step, one in enumerate(kept):
        stage = stage_at(first.stages, step)
        if step == stage.first_step and stage.sources is not None:
            average = grow_mapping(average, stage.sources, prefix=STACK)
        average = {name: 0.75 * value + 0.25 * one.model[name] for name, value in average.items()}
        assert one.average is not None and one.average.keys() == average.keys()
        for name, value in average.items():
            torch.testing.assert_close(one.average[name], value, rtol=1e-5, atol=1e-6)
    # The average is saved and scored; the weights that train do not depend on it.
    saved = weights(world, "tiny")
    assert all(torch.equal(saved[name], kept[-1].average[f"student.{name}"]) for name in saved)
    plain = train(train_request(world, student("interleaved", 8, optimiser={"lr": 1e-2}), "plain"))
    assert all(torch.equal(value, kept[-1].model[f"student.{name}"]) for name, value in weights(world, "plain").items())
    assert scored.loss.train == plain.loss.train and scored.loss.dev != plain.loss.dev


def test_a_resumed_run_starts_at_its_checkpoint(world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = student("distilhubert", 6, checkpoint_every_steps=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config))
    run = begin(train_request(world, config))
    assert run.state.step == 4 and run.state.packs == 4
    # Other settings do not read that checkpoint.
    assert begin(train_request(world, student("distilhubert", 6, seed=1, checkpoint_every_steps=2))).state.step == 0
    train(train_request(world, config))
    assert "from step 4" in capsys.readouterr().err


def test_seeds_differ_and_runs_repeat(world: World) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        metrics = train(train_request(world, student("distilhubert", 3, seed=seed), name))
        assert metrics.provenance == Provenance.of(processor_model())
    one, again, other = (weights(world, name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["feature_projection.projection.weight"], other["feature_projection.projection.weight"])


def test_dev_utterances_change_nothing(world: World) -> None:
    """With and without dev scores the student is the same, bit for bit."""
    scored = train(train_request(world, student("distilhubert", 4), "scored"))
    unscored = train(train_request(world, student("distilhubert", 4, dev_split=None), "unscored"))
    one, other = weights(world, "scored"), weights(world, "unscored")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert scored.loss.dev > 0 and unscored.loss.dev is None and unscored.dev_by_layer == {}


def test_learning_lowers_the_loss(world: World) -> None:
    config = student("distilhubert", 40, optimiser={"lr": 3e-3}, dev_every=1000, log_every=60)
    first = train(train_request(world, student("distilhubert", 1), "first"))
    last = train(train_request(world, config, "last"))
    assert last.loss.dev < 0.9 * first.loss.dev
    assert last.dev_by_layer[6].cosine > first.dev_by_layer[6].cosine


def test_metrics_and_provenance(world: World) -> None:
    metrics = train(train_request(world, student("interleaved", 8)))
    written = json.loads((world.folder / "runs" / "tiny" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics.to_dict()))
    assert written["growth"] == [{"step": step, "layers": layers} for step, layers in ((0, 3), (2, 6), (4, 9), (6, 12))]
    assert written["params"] == sum(value.numel() for value in weights(world, "tiny").values())
    assert set(written["dev_by_layer"]) == {"2", "4", "6"}
    assert written["exposure_bias"] is None and written["epochs"] == pytest.approx(8 / 5)
    folder = world.folder / "students" / "tiny"
    made_from = json.loads((folder / "train_config.json").read_text())
    manifest = json.loads(world.manifest.read_text())
    assert (made_from["teacher"], made_from["store_digest"]) == (manifest["fingerprint"], manifest["digest"])
    assert made_from["from_teacher"] == ["stem"]
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 12
    assert [point.step for point in metrics.dev_curve] == [3, 6, 8]
    assert RunMetrics.read(world.folder / "runs" / "tiny" / "metrics.json").dev_curve == metrics.dev_curve
    depths = curves(world, "tiny")["train/depth.tsv"].split()
    assert depths == ["step", "depth", "2", "3.0", "4", "6.0", "6", "9.0", "8", "12.0"]
    assert {"train/loss.tsv", "train/lr.tsv", "dev/loss.tsv"} < set(curves(world, "tiny"))


@pytest.mark.parametrize("family", ["gendistiller", "gendistiller-2d"])
def test_a_gendistiller_reports_its_exposure_bias(world: World, family: str) -> None:
    metrics = train(train_request(world, student(family, 4)))
    lines = {name: text.split()[-1] for name, text in curves(world, "tiny").items()}
    difference = float(lines["dev/loss.tsv"]) - float(lines["dev/loss_forced.tsv"])
    assert metrics.exposure_bias == pytest.approx(difference) and difference != 0


def test_share_of_teacher_forcing() -> None:
    config = student("gendistiller", 1000, generation={"forcing_first": 1.0, "forcing_last": 0.0})
    draws = [draws_forcing(config, step) for step in range(1000)]
    assert 430 < sum(draws) < 570 and sum(draws[:200]) > 160 and sum(draws[-200:]) < 40
    always = student("gendistiller", 50, generation={"forcing_first": 1.0, "forcing_last": 1.0})
    assert all(draws_forcing(always, step) for step in range(50))
    never = student("gendistiller", 50, generation={})
    assert not any(draws_forcing(never, step) for step in range(50))
    assert draws_forcing(student("gendistiller-2d", 50), 0) and not draws_forcing(student("distilhubert", 50), 0)


def test_a_student_starts_from_the_teachers_weights_where_they_fit(world: World) -> None:
    seed = load_file(world.manifest.with_suffix(".initial.safetensors"))
    first = begin(train_request(world, student("distilhubert")))
    state = first.distiller.student.state_dict()
    assert all(torch.equal(state[name], seed[name]) for name in state)
    for family in ("gendistiller", "gendistiller-2d"):
        generator = begin(train_request(world, student(family)))
        assert generator.parts.copied == ["stem", "projection", "position", "layer 1"]
    deeper = begin(train_request(world, student("gendistiller", shape=SHAPE | {"layers": 3})))
    assert deeper.parts.copied == ["stem", "projection", "position", "layer 1", "layer 2"]  # as many as the file has
    stacked = begin(train_request(world, student("interleaved")))
    assert stacked.parts.copied == ["stem"]
    scratch = begin(train_request(world, student("distilhubert", init="stem")))
    assert scratch.parts.copied == ["stem"] and not scratch.parts.random
    own = scratch.distiller.student.state_dict()
    assert {name.split(".")[0] for name in state if torch.equal(own[name], seed[name]) and own[name].ndim > 1} == {
        "feature_extractor"
    }
    random = begin(train_request(world, student("distilhubert", init="random")))
    assert random.parts.copied == []
    name = "feature_extractor.conv_layers.0.conv.weight"
    assert torch.equal(stacked.distiller.student.state_dict()[name], seed[name])
    assert not torch.equal(random.distiller.student.state_dict()[name], seed[name])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("distilhubert", {"targets": [4, 5]}, "no layer 5; .*2, 4, 6"),
        ("gendistiller", {"shape": SHAPE | {"dim": 8}}, r"shape\.dim: got 8, .*16: a gendistiller "),
        ("gendistiller-2d", {"shape": SHAPE | {"dim": 8}}, r"shape\.dim: got 8, .*16: a gendistiller-2d "),
        ("distilhubert", {"shape": SHAPE | {"stem_channels": 4}}, "stem does not fit.* 8 channels, the student"),
        ("distilhubert", {"shape": SHAPE | {"stem_norm": "layer"}}, "stem does not fit.*group norm"),
        ("layerwise", {"shape": SHAPE | {"layers": 4}}, "no counterpart in a student of 4 layers"),
        ("distilhubert", {"train_splits": ["training"]}, "no split 'training'; it has dev, train"),
    ],
)
def test_settings_that_do_not_fit(world: World, family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RetortError, match=message):
        begin(train_request(world, student(family, **changes)))


def test_missing_initial_weights_name_the_option(world: World) -> None:
    manifest = world.folder / "lonely.json"
    shutil.copy(world.manifest, manifest)
    lonely = World(world.folder, world.corpus, manifest, world.teacher)
    with pytest.raises(RetortError, match=r"teacher\.initial\.safetensors.* not found.*--initial-blocks"):
        begin(train_request(lonely, student("distilhubert")))
    value = json.loads(manifest.read_text())
    del value["initial_weights"]  # as in a manifest that was written before this field existed
    manifest.write_text(json.dumps(value))
    with pytest.raises(RetortError, match=r"lonely\.initial\.safetensors.* not found.*--initial-blocks"):
        begin(train_request(lonely, student("distilhubert")))
    begin(train_request(lonely, student("distilhubert", init="random")))


def test_a_loss_that_is_not_finite_stops_the_run(world: World) -> None:
    config = student("distilhubert", 9, optimiser={"lr": 1e20, "clip": 1e30}, checkpoint_every_steps=1)
    with pytest.raises(RetortError) as caught:
        train(train_request(world, config))
    message = str(caught.value)
    assert "at step 1" in message and "utterance-" in message and "checkpoint.pt" in message and "\n" not in message
    assert not (world.folder / "students" / "tiny").exists()


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of weights, moments and step counts."""
    moments = {
        f"{name} {key}": value
        for name, values in read_state(run.optimiser, run.distiller).items()
        for key, value in values.items()
    }
    return copy.deepcopy(run.distiller.state_dict() | moments)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_bad_step_changes_nothing_and_is_named_one_step_later(world: World) -> None:
    run = begin(train_request(world, student("distilhubert", 9)))
    parts = [run.data.training_parts(pack) for pack in run.data.sampler.packs[:3]]
    [bad] = parts[1]
    [scale] = bad.target_codes.scales
    assert scale is not None
    spoilt = replace(bad, target_codes=replace(bad.target_codes, scales=(scale * math.nan,)))
    batches = iter([parts[0], (spoilt,), parts[2]])
    train_step(run, batches, 0, 1e-3)
    good = state_of(run)
    train_step(run, batches, 1, 1e-3)
    assert equal(state_of(run), good)
    names = ", ".join(run.corpus.ids[index] for index in bad.utterances)
    with pytest.raises(RetortError, match=f"loss nan .* at step 1, .* on utterances {names}; no checkpoint"):
        train_step(run, batches, 2, 1e-3)


def test_fp16_leaves_out_steps_that_overflow_until_the_scale_fits(world: World) -> None:
    run = begin(train_request(world, student("distilhubert", 9, precision="fp16")))
    parts = run.data.training_parts(int(run.data.sampler.packs[0]))
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**60})
    before = state_of(run)
    train_step(run, repeat(parts), 0, 1e-3)
    after = state_of(run)
    assert all(torch.equal(after[name], before[name]) for name in before) and run.scaler.get_scale() == 2.0**59
    assert all(value.count_nonzero() == 0 for name, value in after.items() if name not in before)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 256.0})
    train_step(run, repeat(parts), 1, 1e-3)
    assert not equal(state_of(run), after)
    losses = collect(run)
    assert losses[0] == losses[1] and run.state.skipped == 1  # the same weights, pack and dropout
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**120})
    with pytest.raises(RetortError, match=r"gradient norm (inf|nan) at step"):
        for step in range(2, 40):
            train_step(run, repeat(parts), step, 1e-3)


def test_fp16_resumed_equals_uninterrupted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student("distilhubert", 6, precision="fp16", checkpoint_every_steps=1)
    # Large enough for the first steps to overflow.
    monkeypatch.setattr("train.run.make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0**18))
    train(train_request(world, config, "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config, "parts"))
    train(train_request(world, config, "parts"))
    assert equal(weights(world, "whole"), weights(world, "parts"))
    assert curves(world, "whole") == curves(world, "parts")
    skipped = float(curves(world, "whole")["train/skipped.tsv"].split()[-1])
    assert 0 < skipped < 6


def test_tf32_needs_a_gpu(world: World) -> None:
    with pytest.raises(RetortError, match=r"precision tf32: .*cpu"):
        begin(train_request(world, student("distilhubert", precision="tf32")))


def test_out_of_memory_names_the_setting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HeadDistiller, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(HeadDistiller, "forward", full)
    for micro_frames, advice in ((0, "set optimiser.micro_frames to 48"), (60, "--cut-long")):
        config = student("distilhubert", optimiser={"micro_frames": micro_frames})
        with pytest.raises(RetortError) as caught:
            train(train_request(world, config))
        message = str(caught.value)
        assert message.startswith("tiny: cpu is out of memory at step 0") and "\n" not in message
        assert advice in message and "no checkpoint yet" in message


def test_a_damaged_checkpoint_is_named(world: World) -> None:
    config: StudentConfig = student("distilhubert")
    path = begin(train_request(world, config)).checkpoint
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(RetortError, match=r"checkpoint.pt cannot be read; delete it"):
        begin(train_request(world, config))


def test_a_half_written_checkpoint_is_never_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student("distilhubert", 6, checkpoint_every_steps=2)
    written: list[Path] = []
    save = checkpoint.save

    def full(path: Path, value: checkpoint.Checkpoint) -> None:
        if written:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_bytes", _no_space)
                save(path, value)
        save(path, value)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="No space"):
            train(train_request(world, config))
    assert [file.name for file in written[0].parent.iterdir()] == ["checkpoint.pt"]
    assert begin(train_request(world, config)).state.step == 2


def _no_space(path: Path, data: bytes) -> int:
    with path.open("wb") as file:
        file.write(data[:100])
    raise OSError(28, "No space left on device", str(path))


def arguments(world: World, params: Path, name: str) -> list[str]:
    return [
        "run",
        f"--student={name}",
        f"--config={params}",
        f"--manifest={world.manifest}",
        f"--corpus={world.corpus}",
        f"--out={world.folder / 'students' / name}",
        f"--run={world.folder / 'runs' / name}",
        "--device=cpu",
    ]


def test_errors_of_the_command_are_one_line(world: World) -> None:
    params = world.folder / "params.yaml"
    params.write_text(yaml.safe_dump({"train": {"one": {"family": "distilhubert", "steps": 2, "shape": SHAPE}}}))
    for changed, message in (
        (arguments(world, params, "two"), "unknown student"),
        ([*arguments(world, params, "one")[:-1], "--device=gpu"], "expected cpu, cuda"),
        ([*arguments(world, params, "one")[:-1], "--device=cuda:99"], "CUDA devices"),
        (arguments(world, params, "one")[:-4], "Missing option"),
        ([*arguments(world, params, "one"), f"--manifest={world.folder / 'none.json'}"], "does not exist"),
    ):
        result = CliRunner().invoke(main, changed)
        assert result.exit_code == 1 and message in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_killed_and_run_again(world: World) -> None:
    """The command, killed after a checkpoint and run again, gives the student of an uninterrupted run."""
    section = {
        "family": "distilhubert",
        "steps": 20,
        "shape": SHAPE,
        "checkpoint_every_steps": 1,
        "dev_every": 1000,
    }
    params = world.folder / "params.yaml"
    params.write_text(yaml.safe_dump({"train": {"killed": section}}))
    command = ["train", *arguments(world, params, "killed")]
    process = Command(*command, cwd=world.folder)
    deadline = time.monotonic() + 120
    while not list((world.folder / "checkpoints").glob("killed-*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (world.folder / "students").exists()
    again = run_command(*command, cwd=world.folder)
    assert again.returncode == 0, again.stderr
    assert "from step" in again.stderr and "M parameters" in again.stdout
    from train.config import parse

    whole = train_request(world, parse(StudentConfig, section, where="test"), "whole")
    train(whole)
    folders = [world.folder / "students" / name for name in ("killed", "whole")]
    assert filecmp.cmp(*(folder / "model.safetensors" for folder in folders), shallow=False)
