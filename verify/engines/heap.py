"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's `mallopt`."""
KEPT = 8 << 20
"""Most bytes at its end that a heap keeps, and the least that is allocated outside of heaps."""
HEAPS = 2
"""How many the process's threads share."""


def keep_little() -> None:
    """Let the C library keep little of what is freed. As it is set it keeps up to 64 MB in a heap
    of every thread that ever computed. Nothing happens where the library has no such call.
    """
    settings = {_TRIM_THRESHOLD: KEPT, _MMAP_THRESHOLD: KEPT, _ARENA_MAX: HEAPS}
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in settings.items():
            set_option(option, value)


def give_back() -> None:
    """Give back what the C library's heap keeps of models and sessions that are gone: gigabytes,
    which the next engine would take on top. Nothing happens where the library has no such call.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
