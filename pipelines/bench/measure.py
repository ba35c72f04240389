"""The frame of all benchmarks: a result's head, checks of options, ratios by wall clock and CPU time."""

import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from extract.base.errors import RetortError, unknown
from extract.base.machine import describe_machine
from extract.base.timing import CLOCKS, TimedRun, speed_ratio
from extract.store.codec import CODECS

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


def by_clocks(runs: Sequence[TimedRun], one: str, other: str) -> dict[str, Any]:
    """`speed_ratio` by wall clock and by CPU time, ready for JSON."""
    return {clock: speed_ratio(runs, one, other, clock).to_dict() for clock in CLOCKS}
