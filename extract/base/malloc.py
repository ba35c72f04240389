"""How freed memory is kept: a CPU forward pass allocates and frees the same large blocks again and again."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEEP_BYTES = 2**31 - 1


def keep_freed_blocks() -> None:
    """Tell glibc to keep large freed blocks for the next allocation, not to give them back to the kernel.

    Giving back means a page fault for every 4 kB at the next use: a fifth of the CPU time of extraction on a virtual
    machine (measured). A no-op where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_ARENA_MAX, 1)  # the arenas of other threads would give back all the same
