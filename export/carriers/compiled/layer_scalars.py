"""What is left of a constant where every layer multiplies all that it passes on: Gemma 4.

A layer ends with h ← λ·h, in the constant channels as well. With S_L = λ_0 ⋯ λ_L, rounded layer by
layer as the dtype rounds, a constant channel holds κ·S_L behind layer L: that is what the rule
reads, so that λ may be any number. The new layers' own λ is 1. The norm before a new layer
multiplies the constant channels by a power of two, which brings them to 2⁻⁹ at any depth.

Constants shrink, so that they cannot supply the norms with eps as they do elsewhere; they are
chosen so small that no norm notices: Σκ² is 2⁻²⁰ of eps at most, behind every layer.

Source: derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bake.errors import ExportError
from bake.tensors import DTYPES, to_bits, to_float32
from export.clamped import Clamped

UNNOTICED = 2.0**-10
"""Constants against the root of what eps would allow."""
WANTED = 2.0**-9
"""What arrives of a constant behind the norm before a new layer, r̃ aside, within a factor of √2."""
LARGEST = 2.0**30
"""What a residual stream may grow to by these numbers: float32 still holds the squares of it."""
SMALLEST = 2.0**-90
"""What a constant may shrink to: float32 still divides it by any r̃."""


def rounded(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[np.float64]:
    """To the nearest numbers of F32, BF16 or F16."""
    return (
        to_float32(to_bits(np.atleast_1d(values), dtype), dtype)
        .astype(np.float64)
        .reshape(np.shape(values))
    )


def layer_scalars(source: Clamped) -> list[float]:
    """λ of each layer, as it is stored; 1 where none is, as transformers has it."""
    stored = source.base_tensors
    names = [
        f"{source.layer_prefix}{layer}.layer_scalar"
        for layer in range(int(source.base_config["num_hidden_layers"]))
    ]
    return [float(stored[name].array().item()) if name in stored else 1.0 for name in names]


def scaled_entry(eps: float, scalars: Sequence[float], n_constants: int) -> float:
    """What the embedding holds in a constant channel: a power of two.

    Args:
        eps: rms_norm_eps.
        scalars: of all layers.
        n_constants: constant channels in all.
    """
    largest = float(np.cumprod([1.0, *scalars]).max())
    return 2.0 ** math.floor(math.log2(UNNOTICED * math.sqrt(eps / n_constants) / largest))


def held_behind(entry: float, width: int, scalars: Sequence[float], dtype: str) -> float:
    """κ·S_L, as a model that is loaded in a dtype computes it.

    Args:
        entry: what the embedding holds.
        width: D; embeddings are multiplied by its root.
        scalars: of the layers up to L.
        dtype: float32, bfloat16 or float16.
    """
    stored = DTYPES[dtype]
    held = entry * rounded(np.asarray(math.sqrt(width)), stored)
    for scalar in scalars:
        held = rounded(held * rounded(np.asarray(scalar), stored), stored)
    return float(held)


def made_louder(held: float, layer: int) -> float:
    """The power of two that brings a constant to `WANTED`.

    Raises:
        ExportError: nothing of it is left.
    """
    if not held >= SMALLEST:
        raise ExportError(
            f"layer {layer}: the layer_scalar of the layers up to it leave {held:.1e} of a "
            f"constant; expected {SMALLEST:.1e} or more, which float32 can compare with. Use the "
            "clamped checkpoint, or an adapter"
        )
    return float(2.0 ** round(math.log2(WANTED / held)))


def check_gemma_4(source: Clamped) -> None:
    """Raise ExportError where a Gemma 4 is more than dense layers over a residual stream, or its
    layers multiply by what leaves nothing to compare with.
    """
    name, config = source.name, source.config
    other = {
        "num_kv_shared_layers": "layers that borrow keys and values",
        "hidden_size_per_layer_input": "per-layer embeddings",
        "enable_moe_block": "a mixture of experts",
    }
    for field, what in other.items():
        if value := getattr(config, field, None):
            raise ExportError(
                f"{name}: has {what} ({field} {value}); expected a Gemma 4 of dense layers alone. "
                "Use the clamped checkpoint, or an adapter"
            )
    held = 1.0
    for layer, scalar in enumerate(layer_scalars(source)):
        if not 0 < scalar < math.inf:
            raise ExportError(
                f"{name}: layer_scalar of layer {layer} is {scalar}; expected a positive number, "
                "or no constant comes through that layer. Use the clamped checkpoint, or an adapter"
            )
        held *= scalar
        if not held <= LARGEST:
            raise ExportError(
                f"{name}: layer_scalar of the layers up to {layer} multiply by {held:.1e} in all; "
                f"expected {LARGEST:.1e} at most, or float32 ends. Use the clamped checkpoint, or "
                "an adapter"
            )
