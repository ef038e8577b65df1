"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Give back what the C library's heap keeps of models and sessions that are gone: gigabytes,
    which the next engine would take on top. Nothing happens where the library has no such call.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
