"""`bench load`: the loader and the memory map give the same bytes, and the real command tells what training waits."""

import json
from pathlib import Path

import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.base.timing import TimedRun, TimedSteps
from pipelines.bench.load import LoadBench, Place, files, loader, make_material, memmap, summarise
from tests.bench_world import run_bench_command
from tests.train_world import SHAPE


def bench(params: Path, **changes: object) -> LoadBench:
    settings = {"params": params, "student": "one", "packs": 3, "dim": 32, "codec": "int8", "pack_frames": 1024}
    return LoadBench(**settings | {"rounds": 1, "device": "cpu", "threads": 1} | changes)  # type: ignore[arg-type]


def did(contender: TimedSteps) -> dict[str, int]:
    next(contender)
    next(contender)
    with pytest.raises(StopIteration) as stop:
        next(contender)
    value: dict[str, int] = stop.value.value
    return value


@pytest.mark.parametrize("codec", ["int8", "float16", "int4"])
def test_both_read_the_same_bytes(tmp_path: Path, codec: str) -> None:
    place = Place(bench=bench(tmp_path / "params.yaml", codec=codec), folder=tmp_path)
    packs = make_material(place)
    flat, batches = did(memmap(place)), did(loader(place))
    assert flat == batches and flat["packs"] == packs["number"] >= 3
    assert flat["bytes"] == place.flat.stat().st_size == pytest.approx(packs["bytes"] * packs["number"])
    audio = round(packs["samples"] * packs["number"])
    values = (flat["bytes"] - audio) * {"int8": 1, "float16": 0.5, "int4": 1.6}[codec]  # but for scales
    assert did(files(place))["bytes"] == pytest.approx(2 * values + audio, rel=0.05)
    assert packs["samples"] == pytest.approx(packs["audio_s"] * 32_000)
    assert np.memmap(place.flat, dtype=np.uint8, mode="r").std() > 1


def test_ratios_follow_from_the_runs() -> None:
    figures = [
        ("memmap", 1.0, {"bytes": 4_000, "packs": 4}),
        ("loader", 5.0, {"bytes": 4_000, "packs": 4}),
        ("files", 10.0, {"bytes": 8_000, "packs": 4}),
        ("train", 90.0, {"steps": 9, "seconds_per_step": 10.0, "loader_wait_share": 0.25}),
    ]
    runs = [
        TimedRun(variant=name, round=0, wall_s=wall_s, cpu_s=wall_s, peak_bytes=1, peak_gpu_bytes=None, outcome=what)
        for name, wall_s, what in figures
    ]
    made = summarise(runs)
    assert made["times_as_fast"]["loader/memmap"]["wall_s"]["median"] == 0.2
    assert made["times_as_fast"]["files/memmap"]["cpu_s"]["median"] == 0.1
    assert made["contenders"]["loader"]["seconds_per_pack"]["median"] == 1.25
    assert made["contenders"]["memmap"]["bytes_per_s"]["median"] == 4_000
    assert made["train"]["loader_wait_share"]["median"] == 0.25


def test_a_wrong_request_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="--packs 0: expected more than 0"):
        bench(tmp_path, packs=0)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        json.dumps({"train": {"one": {"family": "distilhubert", "steps": 2, "shape": SHAPE}}})
    )
    arguments = f"--config {tmp_path}/params.yaml --student one --packs 2 --dim 32 --pack-frames 1024 --rounds 1"
    printed = run_bench_command(tmp_path, "load", *arguments.split(), f"--out={tmp_path / 'load.json'}")
    assert "train run waits for the loader" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.json", "params.yaml"]
    result = json.loads((tmp_path / "load.json").read_text())
    assert 0 <= result["train"]["loader_wait_share"]["median"] <= 1
    runs = {run["variant"]: run for run in result["runs"]}
    assert (
        result["times_as_fast"]["loader/memmap"]["wall_s"]["median"]
        == runs["memmap"]["wall_s"] / runs["loader"]["wall_s"]
    )
