"""Contenders that take turns, each run in a process of its own, and what is made of their figures.

A contender is a generator function of the benchmark's settings. It loads and warms up, then yields: the clock starts.
It does its work, then yields: the clock stops. What it returns says what it did.

The order turns round in every round (A B C, C B A, …), so that a machine that slows down slows all of them. A fresh
process a run, because the peak of a process never falls and no contender is to find another's caches warm.
"""

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from extract.base.errors import RetortError, unknown
from extract.store.codec import CODECS
from pipelines.machine import describe_machine

Clocked = Generator[None, None, dict[str, Any]]
Progress = Callable[[str], None]
Settings = TypeVar("Settings")
Result = TypeVar("Result")
CLOCKS = {"wall_s": "wall", "cpu_s": "CPU"}  # of a run; a machine that does other work changes the second little
_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "h5py")


def library_versions() -> dict[str, str]:
    """The libraries that timings depend on."""
    return {library: version(library) for library in _LIBRARIES}


def headed(benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What every result begins with. Call it before the work: it reads how busy the machine is."""
    return {
        "benchmark": benchmark,
        "machine": describe_machine() | {"load_before": round(os.getloadavg()[0], 2)},
        "versions": library_versions(),
        "settings": settings,
    }


def check_asked(asked: object, *above_zero: str) -> None:
    """Raises RetortError unless options are above 0 and finite, and a codec is one, before anything is made."""
    for name in above_zero:
        if not 0 < getattr(asked, name) < math.inf:
            raise RetortError(f"--{name.replace('_', '-')} {getattr(asked, name)}: expected more than 0")
    if (codec := getattr(asked, "codec", None)) is not None and codec not in CODECS:
        raise unknown("codec", codec, CODECS)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender's turn. Memory is the peak of the whole process, loading included."""

    contender: str
    round: int
    wall_s: float
    cpu_s: float  # of all threads of the process
    peak_bytes: int
    peak_gpu_bytes: int | None  # None where nothing ran on a GPU
    did: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median over rounds, and how far the rounds lie apart."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), min=min(values), max=max(values))


def run_interleaved(
    contenders: Mapping[str, Callable[[Settings], Clocked]],
    settings: Settings,
    *,
    rounds: int,
    threads: int | None,
    progress: Progress,
) -> list[Run]:
    """Run every contender once a round. `threads` None leaves their number to the libraries.

    Raises RetortError where a contender does, or where its process was killed.
    """
    runs = []
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            progress(f"round {number + 1} of {rounds}: {name}")
            figures = in_fresh_process(_clock, contenders[name], settings, threads=threads)
            runs.append(Run(contender=name, round=number, **figures))
    return runs


def in_fresh_process(function: Callable[..., Result], *arguments: Any, threads: int | None = None) -> Result:
    """The result of `function` in a process in which nothing ran before."""
    with _omp_threads(threads), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RetortError(
                "a process of the benchmark was killed, most likely for want of memory; give a smaller --pack-frames"
            ) from None


@contextmanager
def _omp_threads(threads: int | None) -> Iterator[None]:
    """Processes that begin in here have so many threads, in torch as in numpy, which ask when they are imported."""
    before = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if threads is not None:
            del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _clock(contender: Callable[[Settings], Clocked], settings: Settings) -> dict[str, Any]:
    steps = contender(settings)
    next(steps)
    wall, cpu = time.perf_counter(), time.process_time()
    next(steps)
    gpu_bytes = _finish_on_gpu()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _peak_bytes()  # before the contender looks at what it did
    try:
        next(steps)
    except StopIteration as stop:
        return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak, "peak_gpu_bytes": gpu_bytes, "did": stop.value}
    raise AssertionError("a contender yields twice: when it is ready, and when it is done")


def _finish_on_gpu() -> int | None:
    """Wait for what still runs on a GPU; the most memory that tensors took there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def _peak_bytes() -> int:
    """The most memory that was ever resident in this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there a child begins with the peak of the process that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spread(runs: Sequence[Run], contender: str, figure: Callable[[Run], float]) -> Spread:
    """A figure of one contender's over the rounds."""
    return Spread.of([figure(run) for run in runs if run.contender == contender])


def times_as_fast(runs: Sequence[Run], one: str, other: str, clock: str) -> Spread:
    """How many times as fast `one` is as `other`, each pair of the same round; `clock` is wall_s or cpu_s."""
    seconds = {(run.contender, run.round): getattr(run, clock) for run in runs}
    rounds = sorted({run.round for run in runs})
    return Spread.of([seconds[other, number] / seconds[one, number] for number in rounds])


def by_clocks(runs: Sequence[Run], one: str, other: str) -> dict[str, Any]:
    """`times_as_fast` by wall clock and by CPU time, ready for JSON."""
    return {clock: asdict(times_as_fast(runs, one, other, clock)) for clock in CLOCKS}
