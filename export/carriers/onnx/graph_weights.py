"""Where a graph's weights lie: in the checkpoint's own safetensors, or in one data file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import StringStringEntryProto, TensorProto

from bake.tensors import Array, StoredTensor
from export.carriers.onnx.graph_builder import Builder
from export.carriers.onnx.precisions import Precision

BLOCK = 32
"""Weights that share one scale in int8 and int4, along a row."""
TABLE_BITS = 8
"""Of the embedding table in int8 and int4: a rounded table costs more answers than it saves."""
WHOLE_BYTES = 1 << 30
"""Most bytes of a matrix, as float32, that ONNX Runtime folds when it loads a graph."""
ALIGNMENT = 4096
"""Of tensors in a data file, so that ONNX Runtime can map them."""
_TABLES = ("embed_tokens.weight", "embed_tokens_per_layer.weight")
_ONNX_TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "BOOL": TensorProto.BOOL,
}


class Weights(Protocol):
    """How a graph gets at the checkpoint's tensors."""

    def linear(self, g: Builder, x: str, name: str, bias: str | None = None) -> str:
        """x: [rows, in] float32 -> x @ W.T (+ bias): [rows, out] float32; W: [out, in]."""
        ...

    def lookup(self, g: Builder, name: str, ids: str) -> str:
        """ids: […] -> rows of a table: […, width] float32."""
        ...

    def exact(self, g: Builder, name: str) -> str:
        """A tensor as float32 (flags stay flags), not rounded any further than it is stored."""
        ...


class Sink(Protocol):
    """What packed weights are written into: a file, mostly."""

    def tell(self) -> int:
        """Bytes written so far."""
        ...

    def write(self, data: bytes | memoryview, /) -> object:
        """Append."""
        ...


# --------------------------------------------------------------------------- in place


class SharedWeights:
    """Initializers that point into the checkpoint's safetensors.

    A matrix over `WHOLE_BYTES` (the output matrix of a large vocabulary) is taken in parts: ONNX
    Runtime turns no larger one into float32 when it loads a graph, but anew at every run.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors

    def linear(self, g: Builder, x: str, name: str, bias: str | None = None) -> str:
        """See `Weights`. Gemm takes the matrix as it lies, so nothing is transposed or copied."""
        n, k = self.tensors[name].shape
        n_parts = -(-4 * n * k // WHOLE_BYTES)
        if n_parts == 1:
            inputs = [x, self.exact(g, name), *([] if bias is None else [self.exact(g, bias)])]
            return g.op("Gemm", *inputs, transB=1)
        assert bias is None  # no Gemma's output matrix has one
        scope, step, outputs = g.scope, -(-n // n_parts), []
        for part, start in enumerate(range(0, n, step)):
            g.scope = f"{scope}.{part}"
            rows = self._initializer(g, name, (start, min(start + step, n)))
            rows = rows if self.tensors[name].dtype == "F32" else g.cast(rows, TensorProto.FLOAT)
            outputs.append(g.op("Gemm", x, rows, transB=1))
        g.scope = f"{scope}.{n_parts}"
        return g.op("Concat", *outputs, axis=-1)

    def lookup(self, g: Builder, name: str, ids: str) -> str:
        """See `Weights`. Only the rows that are looked up become float32."""
        return g.cast(g.op("Gather", self._initializer(g, name), ids), TensorProto.FLOAT)

    def exact(self, g: Builder, name: str) -> str:
        """See `Weights`."""
        stored = self._initializer(g, name)
        if self.tensors[name].dtype in ("F32", "BOOL"):
            return stored
        return g.once(f"{name}.float", lambda: g.cast(stored, TensorProto.FLOAT))

    def _initializer(self, g: Builder, name: str, rows: tuple[int, int] | None = None) -> str:
        """A tensor, or some of its rows, where it lies."""
        tensor = self.tensors[name]
        shape, offset, length = tensor.shape, tensor.offset, tensor.length
        if rows is not None:
            row_bytes = length // shape[0]
            name = f"{name}[{rows[0]}:{rows[1]}]"
            shape = (rows[1] - rows[0], *shape[1:])
            offset, length = offset + rows[0] * row_bytes, shape[0] * row_bytes
        data = location(tensor.file.name, offset, length)
        return g.external(name, _ONNX_TYPES[tensor.dtype], shape, data)


def location(file: str, offset: int, length: int) -> list[StringStringEntryProto]:
    """Where an initializer's data lies, as ONNX writes it down."""
    entries = {"location": file, "offset": str(offset), "length": str(length)}
    return [StringStringEntryProto(key=key, value=value) for key, value in entries.items()]


# --------------------------------------------------------------------------- packed


class PackedWeights:
    """Rounded copies in one data file, written tensor by tensor, a few rows in memory at a time.

    fp32: all as float32. fp16: matrices as float16. int8, int4: matrices in blocks of 32 along a
    row with one float32 scale each (`com.microsoft::MatMulNBits`), a tied embedding table in 8 bits
    in both. Vectors and the clamp's tensors stay float32, and so do the matrices of a compiled
    clamp: they compare numbers.

    Args:
        tensors: of the checkpoint.
        precision: any but the shared one.
        data: the data file, open for writing.
        name: of the data file, as the graph will find it.
        unrounded: beginnings of the names of matrices that stay float32.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        precision: Precision,
        data: Sink,
        name: str,
        unrounded: tuple[str, ...] = (),
    ) -> None:
        self.tensors = tensors
        # Every name begins with nothing.
        self._unrounded = unrounded if precision.bits < 32 else ("",)
        self._bits = precision.bits if precision.blocks else None
        self._data = data
        self._file = name
        self._tables: set[str] = set()

    def linear(self, g: Builder, x: str, name: str, bias: str | None = None) -> str:
        """See `Weights`."""
        if name.startswith(self._unrounded):
            y = g.op("Gemm", x, self.exact(g, name), transB=1)
        elif self._bits is None:
            y = self._half_product(g, x, name)
        else:
            y = self._product(g, x, name)
        return y if bias is None else g.op("Add", y, self.exact(g, bias))

    def lookup(self, g: Builder, name: str, ids: str) -> str:
        """See `Weights`."""
        self._tables.add(name)
        if name.startswith(self._unrounded):
            return g.op("Gather", self.exact(g, name), ids)
        width = self.tensors[name].shape[1]
        if self._bits is None or width % BLOCK:
            return g.cast(g.op("Gather", self._halves(g, name), ids), TensorProto.FLOAT)
        packed, scales = self._blocks(g, name, TABLE_BITS)
        table = g.external(  # the same bytes in two dimensions
            f"{name}.table",
            TensorProto.UINT8,
            self.tensors[name].shape,
            g.initializers[packed].external_data,
        )
        # Of the rows only, and by standard operators, which runtimes for the web have too.
        codes = g.cast(g.op("Gather", table, ids), TensorProto.FLOAT)
        centred = g.op("Sub", codes, g.float(float(1 << (TABLE_BITS - 1))))
        blocks = g.op("Reshape", centred, g.ints(-1, width // BLOCK, BLOCK))
        factors = g.op("Reshape", g.op("Gather", scales, ids), g.ints(-1, width // BLOCK, 1))
        shape = g.op("Concat", g.op("Shape", ids), g.ints(width), axis=0)
        return g.op("Reshape", g.op("Mul", blocks, factors), shape)

    def exact(self, g: Builder, name: str) -> str:
        """See `Weights`."""
        tensor = self.tensors[name]
        if name in g.initializers:
            return name
        flags = tensor.dtype == "BOOL"
        return self._store(
            g,
            name,
            TensorProto.BOOL if flags else TensorProto.FLOAT,
            tensor.shape,
            (tensor.rows(*rows) for rows in tensor.blocks()),
        )

    def _half_product(self, g: Builder, x: str, name: str) -> str:
        matrix = g.op("Transpose", self._halves(g, name), perm=[1, 0])
        product = g.op("MatMul", g.cast(x, TensorProto.FLOAT16), matrix)
        return g.cast(product, TensorProto.FLOAT)

    def _product(self, g: Builder, x: str, name: str) -> str:
        assert self._bits is not None
        n, k = self.tensors[name].shape
        bits = TABLE_BITS if name in self._tables else self._bits
        return g.op(
            "MatMulNBits",
            x,
            *self._blocks(g, name, bits),
            domain="com.microsoft",
            K=k,
            N=n,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,
        )

    def _halves(self, g: Builder, name: str) -> str:
        """A matrix as float16; beyond its range, its largest number."""
        key = f"{name}.fp16"
        if key in g.initializers:
            return key
        largest = np.finfo(np.float16).max
        tensor = self.tensors[name]
        halves = (
            tensor.rows(*rows).clip(-largest, largest).astype(np.float16)
            for rows in tensor.blocks()
        )
        return self._store(g, key, TensorProto.FLOAT16, tensor.shape, halves)

    def _blocks(self, g: Builder, name: str, bits: int) -> tuple[str, str]:
        """A matrix in blocks along its rows: (packed [n, blocks, bytes], scales [n, blocks])."""
        key = f"{name}.int{bits}"
        scales_key = f"{key}.scales"
        if key not in g.initializers:
            tensor = self.tensors[name]
            n, k = tensor.shape
            n_blocks = -(-k // BLOCK)
            scales = np.empty((n, n_blocks), np.float32)

            def packed() -> Iterator[NDArray[np.uint8]]:
                for start, stop in tensor.blocks():
                    codes, scales[start:stop] = quantize(tensor.rows(start, stop), bits)
                    yield codes

            shape = (n, n_blocks, BLOCK * bits // 8)
            self._store(g, key, TensorProto.UINT8, shape, packed())
            self._store(g, scales_key, TensorProto.FLOAT, scales.shape, [scales])
        return key, scales_key

    def _store(
        self,
        g: Builder,
        name: str,
        kind: int,
        shape: Sequence[int],
        blocks: Iterable[NDArray[np.generic]],
    ) -> str:
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        start = self._data.tell()
        for block in blocks:
            self._data.write(np.ascontiguousarray(block).data)
        here = location(self._file, start, self._data.tell() - start)
        return g.external(name, kind, shape, here)


def packed_size(tensors: Mapping[str, StoredTensor], precision: Precision) -> int:
    """Bytes of a data file, at most."""
    size = 0
    for name, tensor in tensors.items():
        n = int(np.prod(tensor.shape))
        if len(tensor.shape) != 2 or ".sae_clamp." in name:
            size += 4 * n + ALIGNMENT
            continue
        if precision.bits == 32:
            size += 4 * n + ALIGNMENT
            continue
        table, width = name.endswith(_TABLES), tensor.shape[1]
        if not precision.blocks or (table and width % BLOCK):
            size += 2 * n + ALIGNMENT
        if precision.blocks:
            n_blocks = n // width * -(-width // BLOCK)
            bits = TABLE_BITS if table else precision.bits
            size += n_blocks * (BLOCK * bits // 8 + 4) + 2 * ALIGNMENT
    return size


def quantize(rows: Array, bits: int) -> tuple[NDArray[np.uint8], Array]:
    """Round rows to nearest, in blocks with one scale each.

    The scale maps the block's value of largest magnitude to the code at the far end, -2^(bits-1),
    so that this value is exact.

    Args:
        rows: [n, k] float32.
        bits: 4 or 8.

    Returns:
        (codes [n, blocks, bytes], two to a byte with 4 bits, the first in the lower half;
        scales [n, blocks]), where weight = (code - 2^(bits-1)) * scale. Missing columns of the
        last block are zeros.

    Source: the layout of `com.microsoft::MatMulNBits`.
    """
    n, k = rows.shape
    n_blocks = -(-k // BLOCK)
    padded = np.zeros((n, n_blocks * BLOCK), np.float32)
    padded[:, :k] = rows
    blocks = padded.reshape(n, n_blocks, BLOCK)
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    middle = 1 << (bits - 1)
    scales: Array = (far / -middle).astype(np.float32)
    normal = np.abs(scales) >= np.finfo(np.float32).tiny  # others have no finite inverse
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=normal)
    codes = np.clip(np.rint(blocks * inverse) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales[..., 0]
