"""Keeping freed memory on the CPU.

A training step frees and asks for the same few hundred buffers over and over. glibc hands large
ones back to the system each time, and the page faults of getting them again cost up to a third of a
bf16 step. CUDA has its caching allocator; here the C library is told to keep what it has.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Serve buffers up to 1 GiB from the heap and never shrink it; False where libc is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
