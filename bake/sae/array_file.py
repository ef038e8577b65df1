"""Arrays of a safetensors or npz file, read row block by row block.

An SAE of a million features is gigabytes, and a clamp needs a few rows of it: nothing here holds
more than one block. Blocks come as float32 whatever the file's dtype.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bake.errors import SAEError
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
            SAEError: the file is truncated, overlaps itself, or holds pickled objects.
        """
        try:
            return cls._open_npz(path) if path.suffix == ".npz" else cls._open_safetensors(path)
        except (OSError, SafetensorError, zipfile.BadZipFile, ValueError, EOFError) as error:
            raise SAEError(
                f"SAE file {path}: is damaged or of another format ({error}); download it again"
            ) from error

    @classmethod
    def _open_safetensors(cls, path: Path) -> ArrayFile:
        stored = stored_tensors(path)
        return cls(path, {name: tensor.shape for name, tensor in stored.items()}, stored)

    @classmethod
    def _open_npz(cls, path: Path) -> ArrayFile:
        shapes = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, _, dtype = _npy_header(file)
                if dtype.hasobject:
                    raise SAEError(
                        f"SAE file {path}: {member} holds pickled objects, which can run code; "
                        "expected plain arrays (np.savez)"
                    )
                shapes[member.removesuffix(".npy")] = shape
        return cls(path, shapes, {})

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
        start = 0
        for block in self.blocks(name):
            for place, row in enumerate(rows):
                if start <= row < start + len(block):
                    out[place] = block[row - start]
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
            with self.path.open("rb") as file:
                file.seek(stored.offset)
                bits = np.dtype(BITS[stored.dtype])
                for block in _read_blocks(file, stored.shape, bits):
                    yield to_float32(block, stored.dtype)
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = _npy_header(file)
            if fortran and len(shape) > 1:
                size = int(np.prod(shape)) * dtype.itemsize
                whole = np.frombuffer(file.read(size), dtype).reshape(shape, order="F")
                yield whole.astype(np.float32)
            else:
                for block in _read_blocks(file, shape, dtype):
                    yield block.astype(np.float32)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an npy stream, which is left at its data."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(file)


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
