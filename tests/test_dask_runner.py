"""Stage one on Dask: the same bytes as in one process, also when workers or the cluster die."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from extract.base.dask_pool import DaskPool, own_device
from extract.base.errors import RetortError
from extract.base.machine import processor_model
from extract.config import ExtractConfig
from extract.corpus import Corpus
from extract.corpus_writer import write_corpus
from extract.run import extract
from extract.store.manifest import Manifest
from tests.conftest import noise_utterances
from tests.processes import ROOT, Command, run_command


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("long")
    write_corpus(
        folder / "long.h5", name="long", reader="folder", utterances=noise_utterances(60, seed=1, shortest=15_000)
    )
    return Corpus.open(folder / "long.json")


@pytest.fixture
def config(teacher: Path, long_corpus: Corpus, tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(
        upstream=str(teacher),
        corpus=long_corpus.path,
        store=tmp_path / "alone",
        manifest=tmp_path / "alone.json",
        pack_frames=128,
        shard_packs=2,
        threads=1,
    )


def elsewhere(config: ExtractConfig, name: str, **changes: object) -> ExtractConfig:
    folder = config.manifest.parent
    return replace(config, store=folder / name, manifest=folder / f"{name}.json", **changes)  # type: ignore[arg-type]


def command(config: ExtractConfig) -> list[str]:
    return [
        *("extract", "run", "--upstream", config.upstream, "--corpus", str(config.corpus)),
        *("--store", str(config.store), "--manifest", str(config.manifest), "--threads", str(config.threads)),
        *("--pack-frames", str(config.pack_frames), "--shard-packs", str(config.shard_packs)),
        *("--cut-long", str(config.cut_long), "--codec", config.codec),
        *(["--scheduler", config.scheduler] if config.scheduler else ["--workers", str(config.workers)]),
        *("--device", config.device),
    ]


class Cluster:
    """A scheduler and its workers, each in a process of its own, as on several machines."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.address_file = folder / "scheduler.json"
        self.processes = [self._start("scheduler", "--port", "0", "--dashboard-address", ":0", "--scheduler-file")]
        for _ in range(workers):
            self.add_worker()

    def _start(self, *arguments: str, **environment: str) -> Command:
        return Command("dask", *arguments, str(self.address_file), environment=environment)

    def add_worker(self, **environment: str) -> None:
        options = ("--nthreads", "2", "--no-dashboard", "--no-nanny", "--scheduler-file")
        self.processes.append(self._start("worker", *options, **environment))

    @property
    def address(self) -> str:
        while not self.address_file.is_file():
            time.sleep(0.05)
        while True:
            try:
                return str(json.loads(self.address_file.read_text())["address"])
            except json.JSONDecodeError:  # the file is being written
                time.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, workers=2)
    yield made
    made.stop()


def finished_shards(config: ExtractConfig) -> list[Path]:
    return sorted(config.store.glob("*/*/shards/*.json"))


def wait_for_shards(config: ExtractConfig, count: int, process: Command) -> None:
    while len(finished_shards(config)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def start(config: ExtractConfig) -> Command:
    return Command(*command(config))


@pytest.mark.parametrize("codec", ["int8", "transform:0.5"])  # one worker fits, all encode
def test_two_workers_write_what_one_process_writes(config: ExtractConfig, codec: str) -> None:
    config = replace(config, codec=codec, cut_long=1.0)  # most utterances are in parts
    alone, _ = extract(config)
    shared = elsewhere(config, "shared", workers=2)
    run = run_command(*command(shared), check=True)
    together = Manifest.read(shared.manifest)
    assert together.corpus == alone.corpus and alone.corpus["num_cut"] > 30
    assert together.objects == alone.objects
    assert together.digest == alone.digest
    assert together.threads == alone.threads == 1
    assert together.device == alone.device == processor_model()
    assert " extract teacher0: " in run.stderr.splitlines()[-1]  # progress, and no line of Dask's


@pytest.mark.parametrize("workers", [0, 1])
def test_initial_weights_do_not_depend_on_where_they_are_made(
    config: ExtractConfig, teacher: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.chdir(teacher.parent)  # workers get absolute paths
    manifest, _ = extract(replace(config, upstream=teacher.name, workers=workers, initial_blocks=1))
    with safe_open(config.manifest.with_suffix(".initial.safetensors"), framework="pt") as file:
        assert json.loads(file.metadata()["config"])["_name_or_path"] == teacher.name
    path = config.manifest.with_suffix(".initial.safetensors")
    assert manifest.initial_weights is not None
    assert manifest.initial_weights["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_worker_killed_in_mid_shard_loses_nothing(config: ExtractConfig, cluster: Cluster) -> None:
    alone, _ = extract(config)
    shared = elsewhere(config, "killed", scheduler=cluster.address)
    process = start(shared)
    wait_for_shards(shared, 2, process)
    os.kill(cluster.processes[-1].pid, signal.SIGKILL)
    assert process.wait(timeout=120) == 0, process.communicate()
    process.communicate()
    assert Manifest.read(shared.manifest).digest == alone.digest


def test_a_cluster_that_dies_costs_unfinished_shards_alone(
    config: ExtractConfig, cluster: Cluster, tmp_path: Path
) -> None:
    alone, _ = extract(config)
    shared = elsewhere(config, "restarted", scheduler=cluster.address)
    process = start(shared)
    wait_for_shards(shared, 3, process)
    cluster.stop()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: the Dask cluster")
    assert "Traceback" not in errors
    assert not shared.manifest.exists()
    before = {path: path.stat().st_mtime_ns for path in finished_shards(shared)}
    assert before
    (tmp_path / "scheduler.json").unlink()
    again = Cluster(tmp_path, workers=1)
    try:
        extract(replace(shared, scheduler=again.address))
    finally:
        again.stop()
    assert Manifest.read(shared.manifest).digest == alone.digest
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_errors_of_a_worker_are_one_line(
    config: ExtractConfig, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extract.base.dask_pool._CONNECT_S", 1)
    wrong = elsewhere(config, "wrong", scheduler=cluster.address, layers=(99,))
    with pytest.raises(RetortError, match="has no layer 99; it has 0 to 4"):
        extract(wrong)
    with pytest.raises(RetortError, match="no Dask scheduler answers there"):
        extract(elsewhere(config, "nowhere", scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(RetortError, match="give one of them"):
        elsewhere(config, "both", workers=1, scheduler="tcp://127.0.0.1:9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_workers_without_a_gpu_are_named(config: ExtractConfig, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, workers=0)
    try:
        cluster.add_worker(CUDA_VISIBLE_DEVICES="1")
        run = run_command(*command(elsewhere(config, "gpus", scheduler=cluster.address, device="cuda")))
    finally:
        cluster.stop()
    assert run.returncode == 1
    *_, line = run.stderr.splitlines()
    assert re.match(r"error: tcp://\S+ on \S+ \(CUDA_VISIBLE_DEVICES=1\) does not have --device cuda", line)
    assert not (tmp_path / "gpus").exists()


def test_workers_of_a_local_cluster_have_a_gpu_each_and_others_the_first_that_they_see() -> None:
    with DaskPool(number=2, address=None, threads=1, piece="shard") as pool:

        def devices(device: str, *, local: bool) -> list[str]:
            options = {"local": local, "pure": False}
            return [
                pool.client.submit(own_device, device, workers=[worker], **options).result() for worker in pool.workers
            ]

        assert sorted(devices("cuda", local=True)) == ["cuda:0", "cuda:1"]
        for device, local in (("cuda", False), ("cuda:3", True), ("cpu", True)):
            assert devices(device, local=local) == [device, device]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are started anew elsewhere")
def test_workers_on_a_cpu_are_copies_of_one_process_that_has_imported_the_libraries() -> None:
    code = """
import os, sys
from extract.base.dask_pool import DaskPool
if __name__ == "__main__":
    with DaskPool(number=2, address=None, threads=1, piece="shard", imports=["colorsys", "no_such_module"]) as pool:
        parents = set(pool.everywhere(os.getppid).values())
        imported = pool.everywhere(lambda: "colorsys" in sys.modules).values()
        print(len(parents), os.getpid() in parents, *imported)
    os.environ["SET_SINCE"] = "yes"
    with DaskPool(number=1, address=None, threads=1, piece="shard") as pool:
        print(set(pool.everywhere(os.getppid).values()) == parents, *pool.everywhere(os.getenv, "SET_SINCE").values())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "True", "True", "True", "yes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_pool_refuses_workers_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="--device cuda: this machine has 0 CUDA devices"):
        DaskPool(number=2, address=None, threads=1, piece="score", device="cuda")
