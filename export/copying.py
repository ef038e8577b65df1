"""Copying files and hashing them in the same pass."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 1 << 20
"""Bytes read at a time: what a core's cache holds while it is hashed and written."""
_WORKERS = 2


def copy_hashed(source: Path, target: Path, advance: Callable[[int], None]) -> str:
    """Copy a file to disk and return its sha256.

    A block is hashed by a second thread while it is written and the next one is read.

    Args:
        source: file to read.
        target: file to create; it is on disk when this returns.
        advance: called with the bytes of each block.
    """
    digest = hashlib.sha256()
    buffers = itertools.cycle([memoryview(bytearray(BLOCK_BYTES)) for _ in range(2)])
    with (
        source.open("rb", buffering=0) as reader,
        target.open("xb", buffering=0) as writer,
        ThreadPoolExecutor(1) as hasher,
    ):
        hashed: Future[None] | None = None
        while n := reader.readinto(buffer := next(buffers)):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, buffer[:n])
            _write_all(writer.fileno(), buffer[:n])
            advance(n)
        if hashed is not None:
            hashed.result()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def copy_all(pairs: list[tuple[Path, Path]], advance: Callable[[int], None]) -> dict[Path, str]:
    """Copy several files, two at a time; returns the sha256 by target."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        jobs = {
            target: pool.submit(copy_hashed, source, target, advance) for source, target in pairs
        }
        try:
            return {target: job.result() for target, job in jobs.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def hash_new(path: Path) -> str:
    """sha256 of a small file that was just written, which is brought to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]
