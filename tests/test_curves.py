"""`train run --log TOOL`: each library's own reader finds the points of DVCLive, also after a kill and a resumption."""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from tests.train_world import SHAPE, World, make_world, stop_after, student, train_request
from train.__main__ import main
from train.curves import TOOLS
from train.distributed import ProcessGroup
from train.loop import open_record, train
from train.progress import TrainingProgress
from train.run import begin

Points = dict[str, dict[int, float]]  # by name and step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return World(tmp_path, made.corpus, made.manifest, made.teacher)


def of_dvclive(world: World) -> Points:
    root = world.folder / "runs" / "tiny" / "plots" / "metrics"
    found: Points = {}
    for file in root.rglob("*.tsv"):
        rows = csv.DictReader(file.read_text().splitlines(), delimiter="\t")
        name = file.relative_to(root).with_suffix("").as_posix()
        found[name] = {int(row["step"]): float(row[file.stem]) for row in rows}
    return found


def of_tensorboard(folder: Path) -> tuple[Points, str]:
    (run,) = (folder / "logs/tensorboard").iterdir()
    events = EventAccumulator(str(run)).Reload()
    facts = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}, facts


def of_mlflow(folder: Path) -> tuple[Points, str]:
    client = MlflowClient((folder / "logs/mlflow").as_uri())
    experiment = client.get_experiment_by_name("retort")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny"
    found: Points = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        found[name] = {point.step: point.value for point in history}
        assert len(found[name]) == len(history)  # no point twice
    return found, str(run.data.params)


def of_wandb(folder: Path) -> tuple[Points, str]:
    found: Points = {}
    files = sorted((folder / "logs/wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # every process has the id of the first
    texts = []
    for file in files:
        for record in records(file):
            texts.append(str(record.run.config))
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for name in values.keys() - {"_step", "_runtime", "_timestamp"}:
                found.setdefault(name, {})[int(values["_step"])] = float(values[name])
    return found, " ".join(texts)


def records(file: Path) -> list[Record]:
    """Return the records of a run's file, which has LevelDB's log format: blocks of 32 KiB with split records."""
    data, at, part, found = file.read_bytes(), 7, b"", []
    while at < len(data):
        if (rest := -at % 32768) < 7:
            at += rest
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


READERS = {"tensorboard": of_tensorboard, "mlflow": of_mlflow, "wandb": of_wandb}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_resumed_run_is_one_record_with_all_points(
    world: World, monkeypatch: pytest.MonkeyPatch, tool: str, made: World, tmp_path: Path
) -> None:
    config = student("interleaved", 8, checkpoint_every_steps=3)
    plain = train(train_request(World(tmp_path / "plain", made.corpus, made.manifest, made.teacher), config))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # the checkpoint is of step 3, points were logged at step 4
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config, log=tool))
    metrics = train(train_request(world, config, log=tool))
    found, facts = READERS[tool](tmp_path)
    expected = of_dvclive(world)
    assert expected["train/depth"] == {2: 3, 4: 6, 6: 9, 8: 12} and set(expected["dev/loss"]) == {3, 6, 8}
    for name, points in expected.items():
        assert found[name] == pytest.approx(points, rel=1e-6)  # TensorBoard has float32
    assert set(found) - set(expected) == {"train/audio_s_per_s"}
    assert set(found["train/audio_s_per_s"]) == set(expected["train/loss"])
    assert plain.config["family"] in facts and "store_digest" in facts and "run_id" in facts
    # The record changes nothing in the run, and no trace of it is left beside a checkpoint.
    assert metrics.loss == plain.loss
    one, other = (load_file(tmp_path / folder / "students/tiny/model.safetensors") for folder in ("plain", "."))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_tool_that_joins_at_a_resumption_gets_the_earlier_points(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = student("distilhubert", 6, checkpoint_every_steps=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(train_request(world, config))
    train(train_request(world, config, log="tensorboard"))
    assert set(of_tensorboard(tmp_path)[0]["train/loss"]) == {2, 4, 6}


def test_a_tool_that_fails_ends_its_record_and_not_the_training(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show = TrainingProgress.advance

    def shown(self: TrainingProgress, **values: Any) -> None:
        show(self, **values)
        if self.done == 3:
            for experiment in (world.folder / "logs/mlflow").glob("[0-9]*"):
                shutil.rmtree(experiment)

    monkeypatch.setattr(TrainingProgress, "advance", shown)
    train(train_request(world, student("distilhubert", 6), log="mlflow"))
    assert (world.folder / "students/tiny/model.safetensors").is_file()
    assert capsys.readouterr().err.count("MLflow takes no more points") == 1


def test_only_the_main_process_opens_a_record(world: World) -> None:
    config = student("distilhubert", 2)
    run = begin(train_request(world, config, processes=ProcessGroup(rank=1), log="tensorboard"))
    assert open_record(run) is None and not (world.folder / "logs").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_missing_library_is_one_line(world: World, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    monkeypatch.setitem(sys.modules, tool, None)
    section = {"family": "distilhubert", "steps": 1, "shape": SHAPE, "optimiser": {"lr": 1e-3}}
    (world.folder / "params.yaml").write_text(yaml.safe_dump({"train": {"tiny": section}}))
    paths = ["--manifest", str(world.manifest), "--corpus", str(world.corpus), "--out", "students/tiny"]
    done = CliRunner().invoke(main, ["run", "--student", "tiny", *paths, "--log", tool])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and f"pip install {tool}" in done.stderr
