"""A GGUF file's header, walked over before `gguf` reads it: every count fits into the file.

`gguf` trusts the counts: of an array of 2^60 numbers it makes a list until memory ends.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

from bake.reading.capped import UnreadableError, open_regular

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_MOST_FIELDS, _MOST_TENSORS, _MOST_VALUES = 4096, 1 << 16, 1 << 22
"""A Gemma has some 40 fields, 1,000 tensors, and three arrays of 262,144 values."""
_MOST_DIMENSIONS = 4


def check_header(path: Path) -> None:
    """Raise where a GGUF file's header does not fit into the file.

    Raises:
        OSError: the file cannot be read.
        UnreadableError: it is no GGUF file of version 2 or 3, or says of itself what cannot be.
    """
    with open_regular(path) as file:
        header = _Header(file, path.stat().st_size)
        magic, version = header.take(4), header.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise UnreadableError(
                f"begins with {magic!r}, version {version}; expected GGUF, 2 or 3"
            )
        n_tensors, n_fields = header.number("Q"), header.number("Q")
        if n_tensors > _MOST_TENSORS or n_fields > _MOST_FIELDS:
            raise UnreadableError(f"states {n_tensors:,} tensors and {n_fields:,} fields")
        for _ in range(n_fields):
            header.skip(header.number("Q"))
            header.value(header.number("I"))
        for _ in range(n_tensors):
            header.skip(header.number("Q"))
            if (n := header.number("I")) > _MOST_DIMENSIONS:
                raise UnreadableError(f"states a tensor of {n:,} dimensions")
            header.skip(8 * n + 4 + 8)


class _Header:
    """What is left of a header."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left, self._values = file, size, 0

    def take(self, n: int) -> bytes:
        self._use(n)
        return self._file.read(n)

    def skip(self, n: int) -> None:
        self._use(n)
        if n < 1 << 16:
            self._file.read(n)  # within the buffer, where a seek would empty it
        else:
            self._file.seek(n, 1)

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            of, n = self.number("I"), self.number("Q")
            self._values += n
            if self._values > _MOST_VALUES:
                raise UnreadableError(f"states arrays of {self._values:,} values")
            if of == _STRING:
                for _ in range(n):
                    self.skip(self.number("Q"))
            else:
                self.skip(n * self._size(of))
        else:
            self.skip(self._size(kind))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise UnreadableError(f"holds a value of type {kind}")
        return _SIZES[kind]

    def _use(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise UnreadableError("ends within its header")
