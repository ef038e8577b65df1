"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import gc

from bake.files.memory import HEAP_KEPT, HEAPS

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's `mallopt`."""


def keep_little() -> None:
    """Let the C library keep little of what is freed. As it is set it keeps up to 64 MB in a heap
    of every thread that ever computed. Nothing happens where the library has no such call.
    """
    settings = {_TRIM_THRESHOLD: HEAP_KEPT, _MMAP_THRESHOLD: HEAP_KEPT, _ARENA_MAX: HEAPS}
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in settings.items():
            set_option(option, value)


def give_back() -> None:
    """Give back what the C library's heap keeps of models and sessions that are gone: gigabytes,
    which the next engine would take on top.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Give back what the C library's heap keeps of what was freed. Nothing happens where the
    library has no such call.
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
