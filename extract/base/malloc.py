"""Settings of glibc's allocator for CPU forward passes, which allocate and free the same large blocks repeatedly."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)
_KEEP_BYTES = 2**31 - 1


def keep_freed_blocks() -> None:
    """Make glibc keep large freed blocks for the next allocation instead of returning them to the kernel.

    A returned block costs one page fault per 4 kB when it is used again: a fifth of the CPU time of extraction on a
    virtual machine (measured). Does nothing under another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_ARENA_MAX, 1)  # arenas of other threads return blocks whatever the thresholds
