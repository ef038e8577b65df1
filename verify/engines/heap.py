"""Memory: what was freed is given back to the system, and what has no room is done in halves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from bake.files.halving import free_cached, in_halves, joined
from bake.files.memory import HEAP_KEPT, HEAPS

Method = TypeVar("Method", bound=Callable[..., Any])

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
    """Give back what the C library's heap, and torch of a GPU, keeps of models and sessions that
    are gone: gigabytes, which the next engine would take on top.
    """
    free_cached()
    trim()


def trim() -> None:
    """Give back what the C library's heap keeps of what was freed. Nothing happens where the
    library has no such call.
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def by_halves(method: Method) -> Method:
    """An engine's method that is given prompts, their tensors rows first and `input_ids` before all
    others: where memory runs out, it is given half of them at a time.
    """

    @wraps(method)
    def whole(self: Any, input_ids: Any, *asked: Any) -> Any:
        def run(rows: slice) -> Any:
            some = [of[rows] if hasattr(of, "shape") else of for of in asked]
            return method(self, input_ids[rows], *some)

        what = f"{self.name}: {method.__name__.replace('_', ' ')}"
        return joined(in_halves(self, what, run, *input_ids.shape))

    return cast(Method, whole)
