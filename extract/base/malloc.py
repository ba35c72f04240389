"""Memory settings of a process that runs or trains models on a CPU, for packs of ever new shapes."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)
_KEEP_BYTES = 2**31 - 1
_COMPILED_KERNELS = 128  # a Base model uses 33 for a pack, and 83 for one with gradients (measured)


def configure_memory() -> None:
    """Keep freed blocks for the next allocation, and few compiled kernels. Call it before torch computes anything.

    A large block that glibc returns to the kernel costs one page fault per 4 kB when it is used again: a fifth of the
    CPU time of extraction on a virtual machine (measured). Another C library is left as it is.

    oneDNN compiles the kernels of a convolution for each shape and keeps the last 1,024. Nearly every pack has a shape
    of its own, so they are not used again: 0.3 to 0.4 GB of a process, in the same time (RESULTS.md). A user's own
    ONEDNN_PRIMITIVE_CACHE_CAPACITY holds.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_COMPILED_KERNELS))  # read by the first convolution
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_ARENA_MAX, 1)  # arenas of other threads return blocks whatever the thresholds
