"""Tensors as safetensors files hold them: where they lie, and their numbers as bits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bake.errors import short, shown
from bake.files.folder_files import wrong_name
from bake.reading.capped import HEADER_BYTES, open_regular, parse_json

Array = NDArray[np.float32]
BITS: dict[str, str] = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2"}
"""Numbers that can be read, as safetensors names their formats, and what holds their bits."""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""As config.json and as safetensors write them."""
_ROW_BYTES = 32 << 20
"""Bytes of float32 that `StoredTensor.blocks` gives at once, about."""
Raw = NDArray[np.unsignedinteger[Any]]
Blocks = Callable[[], Iterator[bytes | memoryview]]
Tensors = dict[str, tuple[str, tuple[int, ...], Blocks]]
"""Of a file that is to be written: dtype, shape and bytes by name."""


def to_float32(raw: Raw, dtype: str) -> NDArray[np.float32]:
    """The bits of F64, F32, BF16 or F16 numbers → float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]
    return raw.view(kind).astype(np.float32, copy=False)


def to_bits(values: NDArray[np.floating[Any]], dtype: str) -> Raw:
    """float32 or float64 → bits of F32, BF16 or F16, to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header; none is read.

    Raises:
        SafetensorError, OSError, ValueError: the file is damaged, its header is larger than any
            model's, or its tensors overlap.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > HEADER_BYTES:
            raise ValueError(f"has a header of {size:,} bytes; expected at most {HEADER_BYTES:,}")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("has a header that is no JSON object")
    try:
        with safe_open(path, framework="np"):
            pass  # checks that offsets neither overlap nor leave the file
    except SafetensorError as error:  # which may quote the file at length
        raise SafetensorError(f"{short(str(error))}; expected a safetensors file") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def indexed_tensors(folder: Path, weight_map: Any) -> dict[str, StoredTensor]:
    """The tensors that an index names, each found in the file where it is placed; none is read.

    Args:
        folder: where the files lie.
        weight_map: tensor name → file name, as it was read from an index.

    Raises:
        OSError, ValueError: it is no such map, names a file that lies elsewhere, or a file is
            missing, damaged or without a tensor.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("the index holds no weight_map")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if wrong_name(shard) is not None or "/" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"the index points outside the folder ({shown(shard)})")
        if not (folder / shard).is_file():
            raise ValueError(f"shard {shard} is missing")
        try:
            shards[shard] = stored_tensors(folder / shard)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"shard {shard} is damaged ({short(str(error))})") from error
    for name, shard in weight_map.items():
        if name not in shards[str(shard)]:
            raise ValueError(f"{short(name)} is not in {shard}, where the index places it")
    return {name: shards[str(shard)][name] for name, shard in weight_map.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, found by its header."""

    file: Path
    dtype: str
    """As safetensors names it: F32, F16, BF16, BOOL, …"""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some rows, [stop - start, …]: float32, or bool where flags are stored.

        Reads these rows and nothing else.
        """
        block = self.bits(start, stop)
        return block if self.dtype == "BOOL" else to_float32(block, self.dtype)

    def bits(self, start: int, stop: int) -> NDArray[Any]:
        """The same as they are stored."""
        stored = np.dtype("?" if self.dtype == "BOOL" else BITS[self.dtype])
        n_columns = int(np.prod(self.shape[1:]))
        with self.file.open("rb") as file:
            file.seek(self.offset + start * n_columns * stored.itemsize)
            data = np.fromfile(file, stored, (stop - start) * n_columns)
        return data.reshape(stop - start, *self.shape[1:])

    def stored_blocks(self) -> Iterator[bytes]:
        """Its bytes as they are stored, some rows at a time."""
        return (self.bits(*rows).tobytes() for rows in self.blocks())

    def array(self) -> NDArray[Any]:
        """All of it, as `rows` gives it."""
        return self.rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def blocks(self, n_bytes: int = _ROW_BYTES) -> list[tuple[int, int]]:
        """Row ranges of about so many bytes of float32 each, in order."""
        row_bytes = 4 * max(1, int(np.prod(self.shape[1:])))
        step = max(1, n_bytes // row_bytes)
        n = self.shape[0]
        return [(start, min(start + step, n)) for start in range(0, n, step)]


# --------------------------------------------------------------------------- writing


def write_tensors(path: Path, tensors: Tensors, advance: Callable[[int], None]) -> str:
    """Write a safetensors file block by block; returns its sha256. It is on disk when this ends."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        end = offset + n_bytes(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file, ThreadPoolExecutor(1) as hasher:
        hashed = hasher.submit(digest.update, (head := len(text).to_bytes(8, "little") + text))
        file.write(head)
        for name, (_, _, blocks) in tensors.items():
            start = file.tell()
            for block in blocks():
                hashed.result()
                hashed = hasher.submit(digest.update, block)
                file.write(block)
                advance(len(block))
            low, high = header[name]["data_offsets"]
            assert file.tell() - start == high - low, name
        hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor of F32, BF16 or F16 numbers, or of flags."""
    return int(np.prod(shape)) * {"F32": 4, "BOOL": 1}.get(dtype, 2)


def index_of(files: Mapping[str, Tensors]) -> dict[str, Any]:
    """model.safetensors.index.json."""
    total = sum(n_bytes(shape, dtype) for f in files.values() for dtype, shape, _ in f.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
