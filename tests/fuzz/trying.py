"""One input, one reader: what comes of it, and how long it may take."""

from __future__ import annotations

import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import BakeoutError, printable
from tests.fuzz.readers import READERS, Reader

SECONDS = 5
"""Most time of a processor that a reader may take for one small file."""
WAITING = 60
"""Longest that it may wait for anything, on a machine that others use too."""
LONGEST_LINE = 3000
"""Most characters of an error's line."""
CORPUS = Path(__file__).with_name("corpus")


class Hang(BaseException):
    """A reader took longer."""


@dataclass(frozen=True)
class Finding:
    """An input that a reader neither took nor refused as it should."""

    reader: str
    what: str
    data: bytes


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, SECONDS),
        signal.SIGALRM: (signal.ITIMER_REAL, WAITING),
    }
    before = {sign: signal.signal(sign, late) for sign in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for sign, handler in before.items():
            signal.signal(sign, handler)


def attempt(name: str, reader: Reader, file: Path, data: bytes) -> Finding | None:
    """Let a reader read a file with these bytes: it takes them, or says in a line why not."""
    file.write_bytes(data)
    try:
        with warnings.catch_warnings(), _limited():
            warnings.simplefilter("ignore")
            reader.read(file.parent)
    except BakeoutError as error:
        line = printable(" ".join(str(error).split()))
        if not line or len(line) > LONGEST_LINE:
            return Finding(name, f"a line of {len(line)} characters: {line[:80]}", data)
    except Hang:
        return Finding(name, f"more than {SECONDS} s", data)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
        return Finding(name, what, data)
    return None


def fuzz(name: str, root: Path, *, seed: int, most: int, seconds: float = 1e9) -> Iterator[Any]:
    """Try mutated files on one reader, until there were so many or so long.

    Yields:
        A Finding, or None where the reader behaved.
    """
    reader = READERS[name]
    file = root / reader.file
    good = file.read_bytes()
    reader.read(file.parent)  # what it imports is not counted
    end = time.monotonic() + seconds
    try:
        for i in range(most):
            rng = random.Random(f"{name} {seed} {i}")
            yield attempt(name, reader, file, reader.mutate(rng, good))
            if time.monotonic() > end:
                return
    finally:
        file.write_bytes(good)
