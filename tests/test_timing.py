"""Interleaved timing: order and processes of the runs, ranges over rounds, failures of a variant."""

import os
import sys
import time
from typing import Any

import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.base.timing import (
    Range,
    TimedRun,
    TimedSteps,
    in_fresh_process,
    peak_gpu_bytes,
    range_of,
    run_interleaved,
    speed_ratio,
    status_bytes,
    synchronise_gpu,
)
from tests.bench_world import invented_run


def computing(settings: float) -> TimedSteps:
    """Wait, then compute for `settings` seconds of CPU time; return the process."""
    time.sleep(0.05)
    yield
    start = time.process_time()
    while time.process_time() - start < settings:
        pass
    yield
    return {"process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def allocating(settings: float) -> TimedSteps:
    """Take 200 MiB and compute nothing."""
    yield
    block = np.ones(200 * 2**20, dtype=np.uint8)
    yield
    return {"process": os.getpid(), "bytes": int(block.sum())}


def queueing(settings: float) -> TimedSteps:
    """Queue `settings` seconds of kernels as the warm-up and compute nothing."""
    import torch

    block = torch.ones(2**18, device="cuda")
    start = time.perf_counter()
    torch.cuda._sleep(round(settings * 1.5e9))  # cycles of a clock of 1 to 2 GHz
    yield
    yield
    return {"queued_s": time.perf_counter() - start, "sum": float(block.sum())}


def refusing(settings: float) -> TimedSteps:
    """Raise a user's error."""
    yield
    raise RetortError("no such device")


def dying(settings: float) -> TimedSteps:
    """Be killed, as if memory ran out."""
    yield
    os._exit(9)


def measured_copies() -> tuple[list[TimedRun], int, int]:
    """Return two runs in copies of this process, and resident bytes of a third copy and of this process."""
    runs = run_interleaved({"it": allocating}, 0.0, rounds=2, threads=None, progress=lambda text: None, start="fork")
    return runs, in_fresh_process(status_bytes, "VmRSS", start="fork"), status_bytes("VmRSS")


def has_gpu() -> bool:
    import torch  # late: processes of the variants import this file, and their memory is compared

    return torch.cuda.is_available()


def test_variants_are_interleaved_each_in_a_process_of_its_own() -> None:
    progress: list[str] = []
    variants = {"computing": computing, "allocating": allocating}
    runs = run_interleaved(variants, 0.1, rounds=2, threads=3, progress=progress.append)
    order = [(run.round, run.variant) for run in runs]
    assert order == [(0, "computing"), (0, "allocating"), (1, "allocating"), (1, "computing")]
    assert len({run.outcome["process"] for run in runs} | {os.getpid()}) == 5
    assert [text.split(": ")[1] for text in progress] == [run.variant for run in runs]
    for run in runs:
        if run.variant == "computing":
            assert run.outcome["threads"] == "3"
            assert 0.1 <= run.cpu_s <= run.wall_s * 1.5
            assert run.peak_bytes < 200 * 2**20
        else:
            assert run.peak_bytes > 200 * 2**20
    assert os.environ.get("OMP_NUM_THREADS") == "1"  # as tests/conftest.py sets it


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_copies_of_a_process_have_its_memory_and_what_the_run_adds() -> None:
    runs, copied, original = in_fresh_process(measured_copies)  # this process has threads, of which a copy has none
    assert len({run.outcome["process"] for run in runs}) == 2
    for run in runs:
        assert copied < original < run.peak_bytes - 200 * 2**20 < original + 50 * 2**20


@pytest.mark.gpu
def test_kernels_of_the_warm_up_run_before_the_clock() -> None:
    """Two seconds of kernels are queued by the warm-up, and none by the work."""
    if not has_gpu():
        pytest.skip("no CUDA device")
    (run,) = run_interleaved({"it": queueing}, 2.0, rounds=1, threads=None, progress=lambda text: None)
    assert run.wall_s < 0.5 < 1 < run.outcome["queued_s"]
    assert run.peak_gpu_bytes is not None and run.peak_gpu_bytes >= 2**20


def test_a_process_without_a_gpu_has_nothing_to_wait_for() -> None:
    synchronise_gpu()
    if not has_gpu():
        assert peak_gpu_bytes() is None


@pytest.mark.parametrize(("variant", "message"), [(refusing, "no such device"), (dying, "was killed")])
def test_a_variant_that_fails_raises_one_line(variant: Any, message: str) -> None:
    with pytest.raises(RetortError, match=message) as caught:
        run_interleaved({"it": variant}, 0.0, rounds=1, threads=None, progress=lambda text: None)
    assert "\n" not in str(caught.value)


def test_ratios_pair_runs_of_the_same_round() -> None:
    """A machine that slows down, 1, 2 and 4 times the seconds, changes the times and not the ratio."""
    runs = [
        invented_run(name, seconds * slowness, round=number, cpu_s=seconds)
        for number, slowness in enumerate((1, 2, 4))
        for name, seconds in (("fast", 2.0), ("slow", 5.0))
    ]
    assert range_of(runs, "fast", lambda run: run.wall_s) == Range(median=4.0, min=2.0, max=8.0)
    assert speed_ratio(runs, "fast", "slow", "wall_s") == Range(median=2.5, min=2.5, max=2.5)
    assert speed_ratio(runs, "slow", "fast", "cpu_s").to_dict() == {"median": 0.4, "min": 0.4, "max": 0.4}
