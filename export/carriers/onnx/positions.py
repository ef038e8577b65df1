"""Where tokens stand: which of them each one sees, how many before it fired, and how queries and
keys are turned.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from export.carriers.onnx.graph_builder import Builder

HIDDEN = float(np.finfo(np.float32).min)
"""Added to the score of what a token must not see, as transformers' eager attention does."""


def masks(g: Builder, windows: Iterable[int | None], total: str) -> dict[int | None, str]:
    """A token sees itself and what stands before it, but no padding, and no further back than
    its layer's window, which counts real tokens: padding may stand anywhere.

    Args:
        g: of the graph.
        windows: of the layers; None sees all.
        total: length of past and new tokens, [1].

    Returns:
        By window [batch, 1, seq, past + seq], 0 or `HIDDEN`.
    """
    total = g.op("Squeeze", total)
    past = g.op("Shape", "past_key_values.0.key", start=2, end=3)
    keys = g.op("Range", g.scalar(0), total, g.scalar(1))  # [past + seq]
    queries = g.op("Range", g.op("Squeeze", past), total, g.scalar(1))
    queries = g.op("Unsqueeze", queries, g.ints(-1))  # [seq, 1]
    real = g.op("Unsqueeze", g.cast("attention_mask", TensorProto.BOOL), g.ints(1, 2))
    seen = g.op("And", g.op("LessOrEqual", keys, queries), real)  # [batch, 1, seq, past + seq]
    found = {}
    for window in dict.fromkeys(windows):
        near = seen
        if window is not None:
            counted = g.op("CumSum", "attention_mask", g.scalar(1))  # [batch, past + seq]
            begin, end = past, g.ints(np.iinfo(np.int64).max)
            here = g.op("Slice", counted, begin, end, g.ints(1))  # [batch, seq]
            first = g.op("Sub", g.op("Unsqueeze", here, g.ints(1, 3)), g.scalar(window))
            counted = g.op("Unsqueeze", counted, g.ints(1, 2))
            near = g.op("And", seen, g.op("Greater", counted, first))
        found[window] = g.op("Where", near, g.float(0.0), g.float(HIDDEN))
    return found


def sequence_gate(g: Builder, on: str, exempt: str, past: str, tau: float) -> tuple[str, str]:
    """Where not more than the share `tau` of the tokens so far fired.

    Args:
        g: of the graph.
        on: which features are active, [batch, seq, k] bool.
        exempt: [batch, seq] bool, tokens that do not fire.
        past: what fired before, [batch, heads, past, head_dim], the same in every head.
        tau: of the gate.

    Returns:
        [batch, seq] bool; what fired, [batch, 1, seq, 1] float32.
    """
    fired = g.op("ReduceMax", g.cast(on, TensorProto.FLOAT), g.ints(-1), keepdims=0)
    begin, end = g.op("Neg", g.op("Shape", exempt, start=1)), g.ints(np.iinfo(np.int64).max)
    real = g.op("Slice", "attention_mask", begin, end, g.ints(1))  # [batch, seq]
    counted = g.op("Slice", g.op("CumSum", "attention_mask", g.scalar(1)), begin, end, g.ints(1))
    counts = g.op("And", g.cast(real, TensorProto.BOOL), g.op("Not", exempt))
    fired = g.op("Mul", fired, g.cast(counts, TensorProto.FLOAT))
    before = g.op("Slice", past, g.ints(0, 0), g.ints(1, 1), g.ints(1, 3))
    before = g.op("ReduceSum", g.cast(before, TensorProto.FLOAT), g.ints(1, 2), keepdims=0)
    n_fired = g.op("Add", before, g.op("CumSum", fired, g.scalar(1)))
    n = g.op("Max", g.cast(counted, TensorProto.FLOAT), g.float(1.0))
    opens = g.op("Greater", g.op("Div", n_fired, n), g.float(tau))
    return g.op("Not", opens), g.op("Unsqueeze", fired, g.ints(1, 3))


def rope(g: Builder, inv_freq: NDArray[np.float32], factor: float) -> tuple[str, str, int]:
    """Cosine, and sine with the sign of the half that it is added to, [batch, 1, seq, head_dim];
    and half of head_dim.

    Args:
        g: of the graph.
        inv_freq: [head_dim / 2].
        factor: on both.
    """
    positions = g.op("Unsqueeze", g.cast("position_ids", TensorProto.FLOAT), g.ints(1, 3))
    angles = g.op("Mul", positions, g.constant(inv_freq))  # [batch, 1, seq, head_dim / 2]
    cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    if factor != 1.0:
        cos, sin = (g.op("Mul", x, g.float(factor)) for x in (cos, sin))
    return (
        g.op("Concat", cos, cos, axis=-1),
        g.op("Concat", g.op("Neg", sin), sin, axis=-1),
        len(inv_freq),
    )
