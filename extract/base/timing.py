"""Interleaved timing of variants, each run in a fresh process: used by `extract speed` and `python -m pipelines bench`.

A variant is a generator function of the settings. It loads and warms up, then yields: the clock starts. It does the
work, then yields: the clock stops. Its return value describes the work, ready for JSON.

The order alternates from round to round (A B C, C B A, …), so that a machine that slows down slows every variant. Each
run has a process of its own, because the peak memory of a process never falls and caches of one variant must not serve
another. Processes are started anew ("spawn"), or are copies of this one ("fork"), which has imported what they all need
and has used neither threads nor a GPU.
"""

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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from extract.base.errors import RetortError

TimedSteps = Generator[None, None, dict[str, Any]]
Progress = Callable[[str], None]
Start = Literal["spawn", "fork"]
Settings = TypeVar("Settings")
Result = TypeVar("Result")
CLOCKS = {"wall_s": "wall", "cpu_s": "CPU"}  # fields of TimedRun; other work on the machine hardly changes CPU time


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """One run of one variant. Memory is the peak of the whole process, loading included."""

    variant: str
    round: int
    wall_s: float  # between the first and the second yield
    cpu_s: float  # of all threads of the process
    peak_bytes: int  # resident memory
    peak_gpu_bytes: int | None  # None if nothing ran on a GPU
    outcome: dict[str, Any]  # the variant's return value


@dataclass(frozen=True, kw_only=True)
class Range:
    """Median, minimum and maximum over rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Range":
        return cls(median=statistics.median(values), min=min(values), max=max(values))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def run_interleaved(
    variants: Mapping[str, Callable[[Settings], TimedSteps]],
    settings: Settings,
    *,
    rounds: int,
    threads: int | None,
    progress: Progress,
    start: Start = "spawn",
) -> list[TimedRun]:
    """Run every variant once a round; `threads` None leaves the number of threads to torch and numpy.

    Raises RetortError if a variant raises it or its process is killed.
    """
    runs = []
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            progress(f"round {number + 1} of {rounds}: {name}")
            shared = status_bytes("VmRSS") if start == "fork" else 0
            figures = in_fresh_process(clock, variants[name], settings, shared, threads=threads, start=start)
            runs.append(TimedRun(variant=name, round=number, **figures))
    return runs


def in_fresh_process(
    function: Callable[..., Result], *arguments: Any, threads: int | None = None, start: Start = "spawn"
) -> Result:
    """Return the result of `function`, called in a new process. Raises RetortError if that process is killed."""
    with _omp_threads(threads), ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RetortError(
                "a process of the measurement was killed, probably because memory ran out; measure with shorter "
                "utterances or with smaller packs (--pack-frames)"
            ) from None


@contextmanager
def _omp_threads(threads: int | None) -> Iterator[None]:
    """Set the number of threads of torch and numpy for processes started inside; both read it when imported."""
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


def clock(variant: Callable[[Settings], TimedSteps], settings: Settings, shared: int = 0) -> dict[str, Any]:
    """Run a variant in this process; return the fields of its TimedRun but for name and round.

    shared: resident bytes of the process that this one is a copy of, 0 if it is none. A copy counts a library's page
    from its first use on; what the variant adds is added to all of the libraries, as if they had been imported here.
    """
    before = status_bytes("VmRSS") if shared else 0
    steps = variant(settings)
    next(steps)
    synchronise_gpu()  # the warm-up's kernels would otherwise run on the clock
    wall, cpu = time.perf_counter(), time.process_time()
    next(steps)
    synchronise_gpu()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak, gpu_bytes = _peak_bytes() - before + shared, peak_gpu_bytes()  # before the variant inspects its results
    try:
        next(steps)
    except StopIteration as stop:
        return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak, "peak_gpu_bytes": gpu_bytes, "outcome": stop.value}
    raise AssertionError("a variant yields exactly twice: before and after the timed work")


def synchronise_gpu() -> None:
    """Wait for the kernels that still run on the GPU, if this process uses one: to be called before a clock is read."""
    if (cuda := _cuda()) is not None:
        cuda.synchronize()


def peak_gpu_bytes() -> int | None:
    """Return the peak bytes of tensors on the GPU, None if this process uses none."""
    return None if (cuda := _cuda()) is None else int(cuda.max_memory_allocated())


def _cuda() -> Any:
    """Return torch.cuda if this process has initialised it."""
    torch = sys.modules.get("torch")  # not imported here: a variant may need numpy alone
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def status_bytes(field: str) -> int:
    """Return a field of the memory of this process, on Linux: VmRSS, what is resident now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    if sys.platform == "linux":
        return status_bytes("VmHWM")  # not getrusage: there a child process inherits the peak of its parent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def range_of(runs: Sequence[TimedRun], variant: str, figure: Callable[[TimedRun], float]) -> Range:
    """Return the range of a figure of one variant over the rounds."""
    return Range.of([figure(run) for run in runs if run.variant == variant])


def speed_ratio(runs: Sequence[TimedRun], one: str, other: str, clock: str) -> Range:
    """Return time of `other` over time of `one`, paired by round; `clock` is wall_s or cpu_s."""
    seconds = {(run.variant, run.round): getattr(run, clock) for run in runs}
    rounds = sorted({run.round for run in runs})
    return Range.of([seconds[other, number] / seconds[one, number] for number in rounds])
