"""In which type a GGUF file stores a tensor: rounded as asked for, but for what a clamp lives by.

A clamp's layers compare numbers, so their MLPs stay float32 whatever the rest is; the constants
that they compare with stand in the embedding, which is rounded to no block of integers and to
float16 only where that holds them exactly. Everything else of the two layers is zeros, and norms
are float32 in every GGUF file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import ExportError
from bake.tensors import StoredTensor, to_bits, to_float32

BLOCK = 32
"""Numbers that share a scale in Q8_0; a row has to hold whole blocks."""


@dataclass(frozen=True)
class OutType:
    """A way to store a model."""

    what: str
    """For help texts."""
    matrices: str
    """Type of matrices, by `gguf`'s name."""
    table: str
    """Type of the embedding, where it holds constants of a clamp."""
    file_type: str
    """Of the file as a whole, by `gguf`'s name."""


OUTTYPES = {
    "f32": OutType("as they are", "F32", "F32", "ALL_F32"),
    "bf16": OutType("16 bits", "BF16", "BF16", "MOSTLY_BF16"),
    "f16": OutType("16 bits", "F16", "F16", "MOSTLY_F16"),
    "q8_0": OutType("8 bits in blocks of 32", "Q8_0", "F16", "MOSTLY_Q8_0"),
}
"""By the names that llama.cpp's own tools give them."""


@dataclass(frozen=True)
class Planned:
    """One tensor of the file."""

    name: str
    """In GGUF."""
    tensor: StoredTensor
    kind: str
    """Type, by `gguf`'s name."""
    plus: float
    """Gemma multiplies with 1 + weight; GGUF stores the sum."""

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Its numbers as the file is to hold them, some rows at a time."""
        for start, stop in self.tensor.blocks():
            yield self.tensor.rows(start, stop) + np.float32(self.plus)


def outtype_of(name: str) -> OutType:
    """By its name.

    Raises:
        ExportError: there is none of this name.
    """
    if name not in OUTTYPES:
        raise ExportError(f"--outtype {name}: expected one of {', '.join(OUTTYPES)}")
    return OUTTYPES[name]


def encoded(values: NDArray[np.float32], kind: str) -> bytes:
    """float32 rows [n, columns] as a GGUF file holds them in a type."""
    if kind == "Q8_0":
        import gguf

        rows: NDArray[np.uint8] = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return rows.tobytes()
    return to_bits(values, kind).tobytes()


def n_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Of a tensor in a type."""
    n = int(np.prod(shape))
    return n // BLOCK * (BLOCK + 2) if kind == "Q8_0" else n * (4 if kind == "F32" else 2)


def table_type(table: StoredTensor, d: int, wanted: str) -> str:
    """The type of an embedding [vocab, D] whose columns from d on hold a clamp's constants: the
    wanted one where they are exact in it, else BF16, whose numbers all of them are.
    """
    if wanted != "F16":
        return wanted
    for start, stop in table.blocks():
        constants = np.ascontiguousarray(table.rows(start, stop)[:, d:])
        if (to_float32(to_bits(constants, "F16"), "F16") != constants).any():
            return "BF16"
    return wanted


def largest_error(values: NDArray[np.float32], kind: str) -> Any:
    """By how much a number may be off after it was stored in a type, each of `values`' own."""
    size = np.abs(values)
    if kind == "Q8_0":  # half a step, and the rounding of the step to float16
        blocks = size.reshape(-1, BLOCK).max(axis=-1, keepdims=True)
        bound = np.broadcast_to(blocks * (0.5 / 127 + 2.0**-10) + 2.0**-17, (blocks.size, BLOCK))
        return bound.reshape(values.shape)
    step, least = {"F32": (0.0, 0.0), "BF16": (2.0**-8, 2.0**-133), "F16": (2.0**-11, 2.0**-25)}[
        kind
    ]
    return size * step + least
