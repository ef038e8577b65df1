"""The weight files of a compiled folder, written tensor by tensor, block by block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bake.tensors import DTYPES, StoredTensor, to_bits
from export.carriers.compiled.stock_layers import MLP
from export.carriers.compiled.widening import BLOCK_BYTES, Widening, widened, widened_blocks
from export.clamped_source import ClampedSource

LAYERS_SHARD = "model-compiled-layers.safetensors"
Blocks = Callable[[], Iterator[bytes | memoryview]]
Tensors = dict[str, tuple[str, tuple[int, ...], Blocks]]
"""Of a file: dtype, shape and bytes by name."""


@dataclass(frozen=True)
class NewLayer:
    """A layer that the base does not have."""

    number: int
    """In the compiled folder."""
    behind: int
    """The base's layer whose output it follows, by the base's number."""
    mlp: MLP


def tensor_files(
    source: ClampedSource, plan: Widening, layers: list[NewLayer]
) -> dict[str, Tensors]:
    """Every weight file of the compiled folder: the base's, widened, and the new layers'."""
    files: dict[str, Tensors] = {name: {} for name in source.base_files}
    sites = [layer.behind for layer in layers]
    for name, tensor in source.tensors.items():
        files[tensor.file.name][_renumbered(name, sites)] = (
            DTYPES[plan.dtype],
            widened(name, tensor.shape, plan).shape,
            partial(widened_blocks, source.folder, name, tensor, plan),
        )
    added: Tensors = {}
    for layer in layers:
        mark = f"layers.{layer.behind}."
        for name, tensor in source.tensors.items():
            if mark in name:
                new = name.replace(mark, f"layers.{layer.number}.")
                added[new] = _new_tensor(name, tensor, layer.mlp, plan)
    return files | {LAYERS_SHARD: added}


def _renumbered(name: str, behind: list[int]) -> str:
    """A base tensor's name, its layer counted with the new ones; `behind` says where they are."""
    before, mark, after = name.partition("layers.")
    if not mark:
        return name
    number, _, rest = after.partition(".")
    moved = int(number) + sum(layer < int(number) for layer in behind)
    return f"{before}layers.{moved}.{rest}"


def _new_tensor(
    name: str, tensor: StoredTensor, mlp: MLP, plan: Widening
) -> tuple[str, tuple[int, ...], Blocks]:
    """A tensor of a new layer, zeros wherever the layer does nothing, shaped like the base's."""
    shape, stored = widened(name, tensor.shape, plan).shape, DTYPES[plan.dtype]
    kind = name.rpartition("layers.")[2].partition(".")[2]
    n = len(mlp.gate)

    def blocks() -> Iterator[bytes | memoryview]:
        values = np.zeros(shape, np.float32)
        match kind:
            case "mlp.gate_proj.weight":
                values[:n] = mlp.gate
            case "mlp.up_proj.weight":
                values[:n] = mlp.up
            case "mlp.down_proj.weight":
                values[:, :n] = mlp.down
            case "post_feedforward_layernorm.weight":
                assert mlp.gain is not None
                values[:] = mlp.gain - 1
        data = to_bits(values, stored).tobytes()
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]

    return stored, shape, blocks


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
    """Size of a tensor of F32, BF16 or F16 numbers."""
    return int(np.prod(shape)) * (4 if dtype == "F32" else 2)


def index_of(files: dict[str, Tensors]) -> dict[str, Any]:
    """model.safetensors.index.json."""
    total = sum(n_bytes(shape, dtype) for f in files.values() for dtype, shape, _ in f.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
