"""The machine: a description of it for measured figures, without the host name, and whether processes may be copied."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """Return processor, cores, memory, system and the versions of Python and torch."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def processor_model() -> str:
    """Return the name that the processor gives itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):  # x86; on ARM the platform module has the name
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def can_copy_processes(device: str) -> bool:
    """Return True if a process for work on `device` may be a copy of one that has imported the libraries.

    It may on Linux and for a CPU. CUDA fails in a copy of a process that may have looked for a GPU.
    """
    return device == "cpu" and sys.platform == "linux"
