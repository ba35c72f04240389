"""Two processes under torchrun: the losses of one, resumption before and after growth, errors that end both."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from safetensors.torch import load_file

from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.store.reader import StoreReader
from tests.distributed_script import run_one
from tests.test_several_teachers import make_store
from tests.train_world import SHAPE, World, make_world, student, train_request
from train.data import PackSampler
from train.distributed import SINGLE_PROCESS, _buckets
from train.run import begin
from train.step import seed_dropout

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With the default dropout, whose masks depend on the pack and not on the process.
PAIR = {"log_every": 1, "optimiser": {"lr": 1e-3, "accumulate": 1, "ema": 0.5}}
ALONE_WITH_TWO = PAIR | {"optimiser": PAIR["optimiser"] | {"accumulate": 2}}
BF16 = {"precision": "bf16"}
EVERY = {"checkpoint_every_steps": 1}
TWO_STORES = {"targets": {"teacher": {"layers": [2, 4, 6]}, "again": {"layers": [2, 6], "weight": 0.5}}}


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    make_store(world, "again", world.teacher, layers=(2, 6))
    shutil.rmtree(world.teacher)
    return world


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """Runs of two processes, all in one start of torchrun, and runs of one process to compare with.

    Eight steps; interleaved grows at 2, 4 and 6. A run that stops at step n resumes from n - 1.
    """
    paths = [str(path) for path in (world.folder, world.corpus, world.manifest, world.teacher)]

    def run(name: str, family: str, changes: dict[str, Any], stop: int | None = None) -> dict[str, Any]:
        return {"paths": paths, "name": name, "family": family, "changes": changes, "stop": stop}

    here = Path.cwd()
    os.chdir(world.folder)
    try:
        for name, family, changes in (
            ("one", "interleaved", ALONE_WITH_TWO),
            ("one-bf16", "interleaved", ALONE_WITH_TWO | BF16),
            ("one-gen", "gendistiller", ALONE_WITH_TWO),
            ("one-both", "interleaved", ALONE_WITH_TWO | TWO_STORES),
        ):
            run_one(**run(name, family, changes))
        run_one(**run("one-then-two", "interleaved", ALONE_WITH_TWO | EVERY, stop=4))
        runs = [
            run("two", "interleaved", PAIR | EVERY),
            run("two-bf16", "interleaved", PAIR | BF16 | EVERY),
            run("two-gen", "gendistiller", PAIR),
            *(run("parts", "interleaved", PAIR | EVERY, stop) for stop in (3, 4, 6, None)),
            *(run("parts-bf16", "interleaved", PAIR | BF16 | EVERY, stop) for stop in (3, 4, None)),
            *(run("two-both", "interleaved", PAIR | EVERY | TWO_STORES, stop) for stop in (4, None)),
            run("one-then-two", "interleaved", PAIR | EVERY),
            run("two-then-one", "interleaved", PAIR | EVERY, stop=6),
            run("left", "interleaved", PAIR | EVERY, stop=3),
        ]
        (world.folder / "runs.json").write_text(json.dumps(runs))
        command = [*TORCHRUN, str(ROOT / "tests" / "distributed_script.py"), "runs.json"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (world.folder / "stderr.txt").write_text(done.stderr)
        run_one(**run("two-then-one", "interleaved", ALONE_WITH_TWO | EVERY))
    finally:
        os.chdir(here)
    return world


def losses(world: World, name: str, split: str = "train") -> list[float]:
    with (world.folder / "runs" / name / "plots" / "metrics" / split / "loss.tsv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]


def metrics(world: World, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((world.folder / "runs" / name / "metrics.json").read_text())
    return value


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    return load_file(world.folder / "students" / name / "model.safetensors")


@pytest.mark.parametrize(
    ("one", "two", "tolerance"),
    [
        ("one", "two", 1e-5),
        ("one-gen", "two-gen", 1e-5),
        ("one-both", "two-both", 1e-5),
        ("one", "one-then-two", 1e-5),
        ("one", "two-then-one", 1e-5),
        ("one-bf16", "two-bf16", 2e-3),  # the last bit of bf16 is 0.4%
    ],
)
def test_two_processes_have_the_losses_of_one(trained: World, one: str, two: str, tolerance: float) -> None:
    assert len(losses(trained, one)) == 8
    np.testing.assert_allclose(losses(trained, two), losses(trained, one), rtol=0, atol=tolerance)
    np.testing.assert_allclose(losses(trained, two, "dev"), losses(trained, one, "dev"), rtol=0, atol=tolerance)
    alone, together = metrics(trained, one), metrics(trained, two)
    assert alone["growth"] == together["growth"] and alone["epochs"] == together["epochs"]
    assert together["dev_by_layer"].keys() == alone["dev_by_layer"].keys()
    for layer, error in alone["dev_by_layer"].items():
        assert together["dev_by_layer"][layer] == pytest.approx(error, abs=tolerance)
    for name, store in alone["stores"].items():
        assert together["stores"][name]["dev"] == pytest.approx(store["dev"], abs=tolerance)


def test_only_the_main_process_prints(trained: World) -> None:
    assert [metrics(trained, name)["processes"] for name in ("one", "two")] == [1, 2]
    made_from = json.loads((trained.folder / "students" / "two" / "train_config.json").read_text())
    assert made_from["packs_per_step"] == 2
    lines = (trained.folder / "stderr.txt").read_text().splitlines()
    assert sum(" two: family interleaved, 8 steps over 5 packs on 2 processes;" in line for line in lines) == 1
    assert sum(" two: grown to 6 layers at step 2" in line for line in lines) == 1


@pytest.mark.parametrize(("whole", "parts"), [("two", "parts"), ("two-bf16", "parts-bf16")])
def test_two_processes_resume_bit_for_bit(trained: World, whole: str, parts: str) -> None:
    expected, found = weights(trained, whole), weights(trained, parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(trained, whole) == losses(trained, parts)
    assert metrics(trained, whole)["dev_by_layer"] == metrics(trained, parts)["dev_by_layer"]
    lines = (trained.folder / "stderr.txt").read_text()
    # Before and after the growth at step 2.
    assert f"{parts}: family interleaved, 8 steps over 5 packs on 2 processes, resumed from step 2" in lines
    assert f"{parts}: family interleaved, 8 steps over 5 packs on 2 processes, resumed from step 3" in lines


def test_other_packs_per_step_start_a_new_run_with_a_note(
    trained: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.folder)
    same = begin(train_request(trained, student("interleaved", 8, **ALONE_WITH_TWO | EVERY), "left"))
    assert same.state.step == 2
    paths = [str(path) for path in (trained.folder, trained.corpus, trained.manifest, trained.teacher)]
    run_one(paths, "left", "interleaved", PAIR | EVERY, stop=1)
    lines = capsys.readouterr().err
    assert "1 packs per step, " in lines and "-2 has another number of them" in lines


def test_dropout_masks_depend_on_the_pack() -> None:
    def mask(seed: int, position: int) -> list[bool]:
        seed_dropout(seed, position)
        return torch.nn.functional.dropout(torch.ones(64)).bool().tolist()

    assert mask(0, 3) == mask(0, 3)
    assert len({tuple(mask(seed, position)) for seed in range(3) for position in range(3)}) == 9


def test_buckets_hold_all_gradients_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.distributed._BUCKET_VALUES", 10)
    gradients = [torch.zeros(size) for size in (4, 6, 1, 30, 2, 8)]
    buckets = list(_buckets(gradients))
    assert [[len(one) for one in bucket] for bucket in buckets] == [[4, 6], [1], [30], [2, 8]]
    assert list(_buckets([])) == []


def test_one_process_needs_no_collectives() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    SINGLE_PROCESS.all_reduce_gradients([parameter])
    SINGLE_PROCESS.check_equal(step=3)
    assert parameter.grad.tolist() == [1.0, 2.0] and SINGLE_PROCESS.all_gather("x") == ["x"] and SINGLE_PROCESS.is_main


# ------------------------------------------------------------------------------------------------- the command itself


def command(world: World, name: str, **section: Any) -> list[str]:
    params = world.folder / f"{name}.yaml"
    values = {"family": "distilhubert", "steps": 6, "shape": SHAPE, "dev_every": 1000} | section
    params.write_text(yaml.safe_dump({"train": {name: values}}))
    return [
        *(*TORCHRUN, "-m", "train", "run", "--device=cpu", f"--student={name}", f"--config={params}"),
        *(f"--manifest={world.manifest}", f"--corpus={world.corpus}", f"--out={world.folder / 'students' / name}"),
    ]


def lines_of_ours(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_the_command_under_torchrun(world: World) -> None:
    done = subprocess.run(
        command(world, "commanded"), cwd=world.folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("M parameters") == 1
    assert metrics(world, "commanded")["processes"] == 2
    assert not list((world.folder / "checkpoints").glob("commanded-*"))


def test_a_loss_that_is_not_finite_on_one_process_stops_both(world: World, tmp_path: Path) -> None:
    """The scale of the second process's second pack is NaN: both stop, and its utterances are named once."""
    folder = tmp_path / "world"
    poisoned = make_world(folder)
    store = StoreReader.open(poisoned.manifest)
    group = zarr.open_group(store.manifest.folder, mode="r+")
    scale = group["scale"][:]
    packs = set(store.pack_of[Corpus.open(poisoned.corpus).select("train")].tolist())
    odd = list(islice(PackSampler(sorted(packs), seed=0).from_position(0), 4))[3]
    scale[odd] = np.nan
    group["scale"][:] = scale
    done = subprocess.run(
        command(poisoned, "poisoned", checkpoint_every_steps=1),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (line,) = lines_of_ours(done.stderr)
    ids = Corpus.open(poisoned.corpus).ids
    training = [ids[index] for index in store.utterances_of(odd) if int(ids[index][-2:]) % 4 != 1]
    assert f"on utterances {', '.join(training)};" in line and "loss nan" in line and "at step 1" in line
    # torchrun's own report ends with the error line.
    assert "traceback : error: poisoned: loss nan" in done.stderr
    assert not (folder / "students").exists()


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_if_one_process_ends_so_do_the_others(world: World, kind: signal.Signals) -> None:
    """One process gets SIGINT or SIGKILL: all end, with at most one line."""
    name = f"ended-{kind.name.lower()}"
    arguments = command(world, name, steps=400, checkpoint_every_steps=1)
    process = subprocess.Popen(arguments, cwd=world.folder, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((world.folder / "checkpoints").glob(f"{name}-*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], kind)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    lines = lines_of_ours(stderr)
    assert len(lines) <= 1
    if kind == signal.SIGINT:
        assert lines and "interrupted" in lines[0]
    else:
        assert "Signal 9 (SIGKILL)" in stderr and all("a process of this run has ended" in line for line in lines)


def test_processes_with_unequal_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.distributed import ProcessGroup

    monkeypatch.setattr(ProcessGroup, "all_gather", lambda self, value: [value, 7])
    with pytest.raises(RetortError, match="steps done before: process 0 has 3, process 1 has 7; "):
        ProcessGroup(0, 2).check_equal(**{"steps done before": 3})
