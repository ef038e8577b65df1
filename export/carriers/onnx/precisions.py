"""The precisions in which ONNX graphs are written: what each stores, and where it lies.

To add one: an entry here, and how its numbers are packed in `graph_weights.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bake.errors import OutputError


@dataclass(frozen=True)
class Precision:
    """How a graph's matrices are stored."""

    file: str
    """Where the graph lies in a folder."""
    engine: str
    """What `verify` calls ONNX Runtime over it."""
    what: str
    """For the command line."""
    bits: int = 32
    """Of a number. Below 16, integers in blocks that share a scale."""
    rounding: str | None = None
    """The key of its rounding in `bake.rounding.EPSILON`; None where nothing is rounded anew."""

    @property
    def shared(self) -> bool:
        """Whether it uses the checkpoint's own weights in place."""
        return self.rounding is None

    @property
    def blocks(self) -> bool:
        """Whether it stores integers in blocks that share a scale."""
        return self.bits < 16


PRECISIONS: dict[str, Precision] = {
    "shared": Precision("model.onnx", "onnx", "the checkpoint's own weights, in place"),
    "fp32": Precision(
        "onnx/model.onnx",
        "onnx-fp32",
        "copies in float32, in one file, where transformers.js looks",
        rounding="float32",
    ),
    "fp16": Precision(
        "onnx/model_fp16.onnx", "onnx-fp16", "copies in float16", bits=16, rounding="float16"
    ),
    "int8": Precision(
        "onnx/model_int8.onnx", "onnx-int8", "copies in 8-bit integers", bits=8, rounding="int8"
    ),
    "int4": Precision(
        "onnx/model_q4.onnx", "onnx-int4", "copies in 4-bit integers", bits=4, rounding="int4"
    ),
}
"""By the name that `bakeout export onnx --precision` takes."""
EXACT = PRECISIONS["shared"].engine
"""The engine that uses the checkpoint's own weights."""


def precision_of(name: str) -> Precision:
    """A precision by its name.

    Raises:
        OutputError: there is none of that name.
    """
    if name not in PRECISIONS:
        raise OutputError(f'precision "{name}"; expected one of {", ".join(PRECISIONS)}')
    return PRECISIONS[name]


def of_engine(engine: str) -> Precision | None:
    """The precision that an engine runs; None of an engine that is no graph."""
    return next((of for of in PRECISIONS.values() if of.engine == engine), None)
