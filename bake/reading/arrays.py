"""Arrays of strangers: what an npz says of itself is checked before any of it is unpacked.

A zip's directory states sizes that its data need not have, and an npy header states a shape that
its file need not have. Here all three agree, or the file is refused.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import short
from bake.reading.capped import UnreadableError, open_regular

MEMBERS = 64
"""Most arrays of an npz: an SAE has 5, witnesses have 7."""
ARRAY_BYTES = 64 << 30
"""Most bytes of one array: a million features of width 8,192 have 34 GB in float32."""
_PACKED = 20
"""Most times that an npz unpacks to its own size; numbers of a float format hardly shrink."""
_DIRECTORY = 1 << 20
"""Most bytes of a zip's directory, and of what may stand after it."""
_NPY_HEADER = 10_000
"""Most bytes of an npy header, numpy's own limit."""
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, KeyError, IndexError),
    *(SyntaxError, RecursionError, MemoryError, OverflowError, NotImplementedError, RuntimeError),
    *(tokenize.TokenError, AttributeError),
)
"""What zipfile and numpy raise of damaged, encrypted or invented files."""


@dataclass(frozen=True)
class Member:
    """An array of an npz, by its header."""

    name: str
    """Of the member, with `.npy`."""
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def opened_npz(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, Member]]]:
    """An npz and its arrays by name, with nothing unpacked but their headers.

    Raises:
        OSError: the file cannot be read.
        UnreadableError: it is no npz, or what it states of itself does not agree. So is whatever
            numpy and zipfile raise within the block.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(guarded := _Guarded(file)) as archive:
            guarded.most = ARRAY_BYTES
            infos = archive.infolist()
            if len(infos) > MEMBERS:
                raise UnreadableError(f"holds {len(infos):,} arrays; expected at most {MEMBERS}")
            members: dict[str, Member] = {}
            for info in infos:
                name = info.filename.removesuffix(".npy")
                if name in members or name == info.filename:
                    raise UnreadableError(f"holds {short(repr(info.filename))}, twice or no array")
                members[name] = _member(archive, info)
            total, size = sum(m.n_bytes for m in members.values()), guarded.seek(0, io.SEEK_END)
            if total > _PACKED * size + _DIRECTORY:
                raise UnreadableError(
                    f"unpacks to {total:,} bytes; expected at most {_PACKED} times its own {size:,}"
                )
            yield archive, members
    except (UnreadableError, OSError):
        raise
    except _DAMAGED as error:
        reason = short(" ".join(str(error).split())) or type(error).__name__
        raise UnreadableError(f"is damaged or no npz ({reason})") from error


def read_npz(path: Path, most: int) -> dict[str, NDArray[Any]]:
    """All arrays of a small npz.

    Args:
        path: of the file.
        most: bytes that the file, and all its arrays together, may have.

    Raises:
        OSError, UnreadableError: as `opened_npz`, or it is larger.
    """
    with open_regular(path, most):
        pass
    with opened_npz(path) as (archive, members):
        total = sum(member.n_bytes for member in members.values())
        if total > most:
            raise UnreadableError(f"unpacks to {total:,} bytes; expected at most {most:,}")
        return {name: _array(archive, member) for name, member in members.items()}


def at_data(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an npy stream, which is left at its data."""
    head = file.read(8)
    version = head[6:]
    if head[:6] != np.lib.format.MAGIC_PREFIX or version not in (b"\1\0", b"\2\0"):
        raise UnreadableError(f"holds no npy of version 1.0 or 2.0, but {head!r}")
    size = file.read(2 if version == b"\1\0" else 4)
    length = int.from_bytes(size, "little")
    if length > _NPY_HEADER:
        raise UnreadableError(f"has an npy header of {length:,} bytes")
    header = io.BytesIO(size + file.read(length))
    if version == b"\1\0":
        return np.lib.format.read_array_header_1_0(header)
    return np.lib.format.read_array_header_2_0(header)


class _Guarded:
    """A zip's file, whose directory is read in one piece of a size that the file states."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.most = file, _DIRECTORY

    def read(self, n: int | None = -1) -> bytes:
        if n is None or n < 0 or n > self.most:
            data = self._file.read(self.most + 1)
            if len(data) > self.most:
                raise UnreadableError(f"has a directory of more than {self.most:,} bytes")
            return data
        return self._file.read(n)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    if info.flag_bits & 0x1:
        raise UnreadableError(f"{short(repr(info.filename))} is encrypted; expected plain arrays")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableError(
            f"{short(repr(info.filename))} is packed by method {info.compress_type}; expected "
            "np.savez or np.savez_compressed"
        )
    with archive.open(info) as file:
        shape, fortran, dtype = at_data(file)
        begin = file.tell()
    if dtype.hasobject:
        raise UnreadableError(
            f"{info.filename} holds pickled objects, which can run code; expected plain arrays "
            "(np.savez)"
        )
    if any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8:
        raise UnreadableError(f"{info.filename} has shape {short(repr(shape))}")
    member = Member(info.filename, shape, fortran, dtype)
    if member.n_bytes != info.file_size - begin or member.n_bytes > ARRAY_BYTES:
        raise UnreadableError(
            f"{info.filename} states {short(repr(shape))} of {dtype} and has "
            f"{info.file_size - begin:,} bytes of them; expected {short(str(member.n_bytes))}, and "
            f"at most {ARRAY_BYTES:,}"
        )
    return member


def _array(archive: zipfile.ZipFile, member: Member) -> NDArray[Any]:
    with archive.open(member.name) as file:
        at_data(file)
        data = file.read(member.n_bytes)
    if len(data) != member.n_bytes:
        raise UnreadableError(f"{member.name} ends early; expected {member.n_bytes:,} bytes")
    whole = np.frombuffer(bytearray(data), member.dtype).astype(_native(member), copy=False)
    return whole.reshape(member.shape, order="F" if member.fortran else "C")


def _native(member: Member) -> np.dtype[Any]:
    """Its dtype in this machine's order of bytes, which torch asks for."""
    return member.dtype.newbyteorder("=")
