"""Many rows at once, and half as many where memory runs out: with a note, and so from there on."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from bake.errors import RanOutError, TooLargeError, short

_NO_MEMORY = re.compile(
    r"(out of|not enough|can't allocate|failed to allocate) memory|bad_alloc|_ALLOC_FAILED", re.I
)
"""What torch, its libraries and ONNX Runtime say where there is none."""
_held: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""By model or engine, and by what it did: the most that was asked of it after memory ran out."""
_whole_only = False
"""Whether this process may not do with less."""
T = TypeVar("T")


def never_halve() -> None:
    """From here on, running out of memory is an error: what comes of fewer rows may be rounded
    otherwise, and others count on equal bits.
    """
    global _whole_only
    _whole_only = True


def in_halves(
    owner: Any, what: str, run: Callable[[slice], T], n: int, each: int = 1, most: int | None = None
) -> list[T]:
    """Do something for all of some rows; where memory runs out, for half as many at a time.

    All at once unless memory runs out: how a matrix product is rounded may depend on how many rows
    it has, so the size is the same on every machine on which it fits.

    Args:
        owner: the model or engine whose memory it takes; what held for it is kept to.
        what: is done, for the note on stderr.
        run: does it for some of the rows; where it raises, nothing may have changed.
        n: how many rows there are.
        each: how large one is: its tokens, where rows are sequences.
        most: rows to begin with; all of them by default.

    Returns:
        What `run` gave, part by part, in order.

    Raises:
        RanOutError: one row alone does not fit, or all of them where fewer may not be taken.
    """
    size = n if most is None else most
    if held := _held.get(owner, {}).get(what):
        size = min(size, max(1, held // each))
    found: list[T] = []
    start = 0
    while start < n:
        rows = slice(start, min(start + size, n))
        tried = rows.stop - start
        try:
            found.append(run(rows))
            start = rows.stop
            continue
        except Exception as error:
            if not out_of_memory(error):
                raise
            if tried == 1 and isinstance(error, TooLargeError):  # it says who, and what to do
                raise RanOutError(f"{error}") from error
            if tried == 1 or _whole_only:
                at = "one alone" if tried == 1 else f"{tried:,} at once, and fewer may not be taken"
                raise RanOutError(
                    f"{what}: memory ran out at {at} ({reason_in(error)}); take shorter texts, or "
                    "a device with more memory"
                ) from error
        size = tried // 2
        _held.setdefault(owner, {})[what] = size * each
        free_cached()  # now that the error, and what its frames held, is gone
        print(
            f"note: {what}: memory ran out at {tried:,} at once; going on with {size:,}",
            file=sys.stderr,
        )
    return found


def joined(parts: Sequence[T]) -> T:
    """What `in_halves` gives, as if it were of all rows at once.

    Args:
        parts: tensors, rows first, or dicts, tuples, lists or dataclasses, alike in all parts.
            Rows of tokens that are shorter than another part's end in -1.
    """
    first: Any = parts[0]
    if len(parts) == 1 or first is None:
        found = first
    elif isinstance(first, dict):
        found = {key: joined([of[key] for of in cast(Any, parts)]) for key in first}
    elif isinstance(first, tuple | list):
        found = type(first)(joined(of) for of in zip(*cast(Any, parts), strict=True))
    elif is_dataclass(first):
        names = [of.name for of in fields(first)]
        found = replace(
            cast(Any, first), **{n: joined([getattr(p, n) for p in parts]) for n in names}
        )
    else:
        import torch

        tensors = cast(Sequence[torch.Tensor], parts)
        if len({of.shape[1:] for of in tensors}) > 1:
            longest = max(of.shape[1] for of in tensors)
            pad = torch.nn.functional.pad
            tensors = [pad(of, (0, longest - of.shape[1]), value=-1) for of in tensors]
        found = torch.cat(list(tensors))
    return cast(T, found)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or ONNX Runtime says that memory ran out."""
    if isinstance(error, MemoryError | TooLargeError):
        return True
    if type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError):
        return True  # torch's
    known = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return known and _NO_MEMORY.search(str(error)) is not None


def reason_in(error: BaseException) -> str:
    """What an error says, on one line, or its type where it says nothing."""
    return short(" ".join(str(error).split()) or type(error).__name__)


def free_cached() -> None:
    """Give back what torch keeps of a GPU's memory, which other processes may want."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
