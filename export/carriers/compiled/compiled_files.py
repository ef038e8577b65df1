"""The weight files of a compiled folder, written tensor by tensor, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bake.tensors import DTYPES, Blocks, StoredTensor, Tensors, to_bits
from export.carriers.compiled.stock_layers import MLP
from export.carriers.compiled.widening import BLOCK_BYTES, Widening, widened, widened_blocks
from export.clamped import Clamped

LAYERS_SHARD = "model-compiled-layers.safetensors"


@dataclass(frozen=True)
class NewLayer:
    """A layer that the base does not have."""

    number: int
    """In the compiled folder."""
    behind: int
    """The base's layer that its tensors are shaped like, by the base's number."""
    mlp: MLP | None
    """None where it does nothing."""


def tensor_files(
    source: Clamped, plan: Widening, layers: list[NewLayer], numbers: Sequence[int]
) -> dict[str, Tensors]:
    """Every weight file of the compiled folder: the base's, widened, and the new layers'.

    Args:
        source: what is compiled.
        plan: how it is widened.
        layers: that are new.
        numbers: in the compiled folder, of the base's layers.
    """
    files: dict[str, Tensors] = {name: {} for name in source.base_files}
    for name, tensor in source.base_tensors.items():
        files[tensor.file.name][_renumbered(name, numbers)] = (
            DTYPES[plan.dtype],
            widened(name, tensor.shape, plan).shape,
            partial(widened_blocks, name, tensor, plan),
        )
    added: Tensors = {}
    for layer in layers:
        mark = f"layers.{layer.behind}."
        for name, tensor in source.base_tensors.items():
            if mark in name:
                new = name.replace(mark, f"layers.{layer.number}.")
                added[new] = _new_tensor(name, tensor, layer.mlp, plan)
    return files | {LAYERS_SHARD: added}


def _renumbered(name: str, numbers: Sequence[int]) -> str:
    """A base tensor's name, its layer counted with the new ones."""
    before, mark, after = name.partition("layers.")
    if not mark:
        return name
    number, _, rest = after.partition(".")
    return f"{before}layers.{numbers[int(number)]}.{rest}"


def _new_tensor(
    name: str, tensor: StoredTensor, mlp: MLP | None, plan: Widening
) -> tuple[str, tuple[int, ...], Blocks]:
    """A tensor of a new layer, zeros wherever the layer does nothing, shaped like the base's."""
    shape, stored = widened(name, tensor.shape, plan).shape, DTYPES[plan.dtype]
    kind = name.rpartition("layers.")[2].partition(".")[2]
    before = f"{'pre_feedforward' if plan.post_norm else 'post_attention'}_layernorm.weight"

    def blocks() -> Iterator[bytes | memoryview]:
        values = np.full(shape, 1.0 if kind == "layer_scalar" else 0.0, np.float32)
        if mlp is not None:
            fill(values, mlp)
        data = to_bits(values, stored).tobytes()
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]

    def fill(values: NDArray[np.float32], mlp: MLP) -> None:
        n = len(mlp.gate)
        match kind:
            case "mlp.gate_proj.weight":
                values[:n] = mlp.gate
            case "mlp.up_proj.weight":
                values[:n] = mlp.up
            case "mlp.down_proj.weight":
                values[:, :n] = mlp.down
            case "post_feedforward_layernorm.weight":
                assert mlp.gain is not None
                values[:] = mlp.gain - plan.norm_adds
            case _ if kind == before:
                values[:] = mlp.before - plan.norm_adds

    return stored, shape, blocks
