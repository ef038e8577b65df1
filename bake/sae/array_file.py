"""Arrays of a safetensors or npz file, read row block by row block.

An SAE of a million features is gigabytes, and a clamp needs a few rows of it: nothing here holds
more than one block. Blocks come as float32 whatever the file's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bake.errors import SAEError, short
from bake.reading.arrays import at_data, opened_npz
from bake.tensors import BITS, Array, StoredTensor, stored_tensors, to_float32

BLOCK_BYTES = 8 << 20
"""Bytes of one block, about."""


@dataclass(frozen=True)
class ArrayFile:
    """The named arrays of one file; `open` checks the file's structure, not its values."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    """Shape of each array."""
    _stored: dict[str, StoredTensor]
    """safetensors: where each array lies; npz: empty."""

    @classmethod
    def open(cls, path: Path) -> ArrayFile:
        """Read the directory of a `.safetensors` or `.npz` file.

        Raises:
            SAEError: the file is truncated, overlaps itself, holds pickled objects, or numbers of
                another kind than SAEs have.
        """
        with _named(path):
            return cls._open_npz(path) if path.suffix == ".npz" else cls._open_safetensors(path)

    @classmethod
    def _open_safetensors(cls, path: Path) -> ArrayFile:
        stored = stored_tensors(path)
        return cls(path, {name: tensor.shape for name, tensor in stored.items()}, stored)

    @classmethod
    def _open_npz(cls, path: Path) -> ArrayFile:
        with opened_npz(path) as (_, members):
            for name, member in members.items():
                if member.dtype.kind != "f" or member.dtype.itemsize not in (2, 4, 8):
                    raise ValueError(
                        f"{name} holds {member.dtype}; expected float16, float32 or float64"
                    )
            return cls(path, {name: member.shape for name, member in members.items()}, {})

    def blocks(self, name: str) -> Iterator[Array]:
        """The rows of an array in order, a few at a time: [rows, …] float32 each.

        Raises:
            SAEError: a value is NaN or infinite.
        """
        start = 0
        for block in self._raw_blocks(name):
            if not np.isfinite(block).all():
                row = start + int(np.argwhere(~np.isfinite(block.reshape(len(block), -1)))[0][0])
                raise SAEError(
                    f"SAE file {self.path}: {name} is not finite in row {row}; download it again"
                )
            start += len(block)
            yield block

    def rows(self, name: str, rows: Sequence[int]) -> Array:
        """array[rows]: [len(rows), …]."""
        out = np.empty((len(rows), *self.shapes[name][1:]), np.float32)
        wanted, start = np.asarray(rows, np.int64), 0
        for block in self.blocks(name):
            places = np.flatnonzero((wanted >= start) & (wanted < start + len(block)))
            out[places] = block[wanted[places] - start]
            start += len(block)
        return out

    def columns(self, name: str, columns: Sequence[int]) -> Array:
        """array[:, columns]: [rows, len(columns)]."""
        return np.concatenate([block[:, list(columns)] for block in self.blocks(name)])

    def matrix(self, name: str) -> Array:
        """A whole array, filled block by block."""
        out = np.empty(self.shapes[name], np.float32)
        start = 0
        for block in self.blocks(name):
            out[start : start + len(block)] = block
            start += len(block)
        return out

    def vector(self, name: str) -> Array:
        """A whole one-dimensional array."""
        return np.concatenate(list(self.blocks(name)))

    def _raw_blocks(self, name: str) -> Iterator[Array]:
        if self._stored:
            stored = self._stored[name]
            if stored.dtype not in BITS:
                raise SAEError(
                    f"SAE file {self.path}: {name} is {stored.dtype}; "
                    f"expected one of {', '.join(BITS)}"
                )
            with _named(self.path), self.path.open("rb") as file:
                file.seek(stored.offset)
                bits = np.dtype(BITS[stored.dtype])
                for block in _read_blocks(file, stored.shape, bits):
                    yield to_float32(block, stored.dtype)
            return
        with _named(self.path), opened_npz(self.path) as (archive, members):
            member = members[name]
            with archive.open(member.name) as file:
                shape, fortran, dtype = at_data(file)
                if fortran and len(shape) > 1:
                    whole = np.frombuffer(file.read(member.n_bytes), dtype)
                    yield whole.reshape(shape, order="F").astype(np.float32)
                else:
                    for block in _read_blocks(file, shape, dtype):
                        yield block.astype(np.float32)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with a file becomes an SAEError that names it."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SAEError(
            f"SAE file {path}: is damaged or of another format ({short(reason)}); download it again"
        ) from error


def _read_blocks(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[NDArray[Any]]:
    """Rows as they are stored."""
    row_shape = shape[1:]
    row_bytes = int(np.prod(row_shape)) * dtype.itemsize
    per_block = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], per_block):
        n = min(per_block, shape[0] - start)
        data = file.read(n * row_bytes)
        if len(data) != n * row_bytes:
            raise EOFError(f"file ends within row {start + len(data) // row_bytes}")
        yield np.frombuffer(data, dtype).reshape(n, *row_shape)
