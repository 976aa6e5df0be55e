"""glibc's malloc during training: freed memory is kept instead of being handed back to the kernel after each tensor.

A training step allocates the same large tensors again and again; by default each of them is fetched from the kernel,
which fills it with zeros page by page (a sixth of a float32 step's time on a small network).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_DEFAULT_MMAP_MAX = 65536
_DEFAULT_TRIM_BYTES = 128 * 1024
_MOST = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it, freed memory stays with this process, where the C library is glibc; elsewhere nothing changes."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_BYTES)
        libc.malloc_trim(0)
