"""The C library's allocator, which torch uses on the CPU.

By default glibc maps every block of more than 128 KiB and unmaps it when it is freed, and the kernel clears its
pages each time: up to a quarter of a training step of a small model.
"""

import ctypes
import platform

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Reuse freed blocks of up to 32 MiB (glibc's limit) instead of returning them to the kernel."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
    libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(_TOP_PAD, 1 << 26)
