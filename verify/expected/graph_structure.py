"""A graph against the one that the exporter writes from the same config and weights: every node,
attribute, constant, function and place of data.

Names are the exporter's own and always the same; what onnxscript names within a function, and the
last digit of what a processor computes (rotary frequencies), are let be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.rounding import EPSILON
from verify.report.findings import Failure

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, TensorProto

LAST_DIGITS = 8 * EPSILON["float32"]
"""By how much a constant of floats may be off, by its own size."""
_VERSIONS = ("bakeout.version",)
"""What metadata may say otherwise."""


def graph_differences(
    engine: str, file: str, found: ModelProto, expected: ModelProto, *, origin: bool
) -> Iterator[Failure]:
    """One failure of kind `integrity` for the first of every sort of thing that is not the
    exporter's.

    Args:
        engine: that runs the graph.
        file: of the graph, in its folder.
        found: as it was read.
        expected: as the exporter writes it.
        origin: whether the weights that it was made from are in the folder.
    """
    one, other = _normal(found, expected, origin), _normal(expected, expected, origin)
    if _bytes(one) == _bytes(other):
        return
    said = list(_told(one, other)) or ["something besides its nodes, weights and functions"]
    for what in said:
        text = f"{file}: {what}, which the exporter does not write from config.json and the weights"
        yield Failure("integrity", engine, text, None, None)


def _told(found: ModelProto, expected: ModelProto) -> Iterator[str]:
    """What is otherwise, the first of each sort, in words."""
    for node, wanted in _unequal(found.graph.node, expected.graph.node):
        if node is None:
            yield f"lacks node {wanted.name} ({wanted.op_type})"
        else:
            yield f"has node {node.name or '(no name)'} ({node.domain or 'ai.onnx'}.{node.op_type})"
        break
    for tensor, wanted in _unequal(found.graph.initializer, expected.graph.initializer):
        if tensor is None:
            yield f"lacks tensor {wanted.name}"
        else:
            yield f"has tensor {tensor.name} with other numbers, or elsewhere"
        break
    for function, wanted in _unequal(found.functions, expected.functions):
        at = wanted if function is None else function
        yield f"has another body of {at.domain}.{at.name}"
        break
    for field in ("input", "output"):
        if any(True for _ in _unequal(getattr(found.graph, field), getattr(expected.graph, field))):
            yield f"has other {field}s"
    if list(_unequal(found.metadata_props, expected.metadata_props)):
        yield "has other metadata"


def _unequal(found: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs at one place that are not alike; None where there is none."""
    for place in range(max(len(found), len(expected))):
        one = found[place] if place < len(found) else None
        other = expected[place] if place < len(expected) else None
        if one is None or other is None or _bytes(one) != _bytes(other):
            yield one, other


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _normal(model: ModelProto, expected: ModelProto, origin: bool) -> ModelProto:
    """The same model with what may be otherwise as the expected one has it."""
    import onnx

    normal = onnx.ModelProto()
    normal.CopyFrom(model)
    normal.producer_version = ""
    stated = {entry.key: entry.value for entry in normal.metadata_props}
    for key in (*_VERSIONS, *(() if origin else ("bakeout.weights_sha256",))):
        if key in stated:
            stated[key] = ""
    del normal.metadata_props[:]
    onnx.helper.set_model_props(normal, dict(sorted(stated.items())))
    wanted = {tensor.name: tensor for tensor in expected.graph.initializer}
    for tensor in normal.graph.initializer:
        if tensor.name in wanted and _alike(tensor, wanted[tensor.name]):
            tensor.CopyFrom(wanted[tensor.name])
        places = sorted(tensor.external_data, key=lambda entry: entry.key)
        del tensor.external_data[:]
        tensor.external_data.extend(places)
    for function in normal.functions:
        _rename(function)
    return normal


def _alike(tensor: TensorProto, wanted: TensorProto) -> bool:
    """Whether two constants of floats are equal but for their last digits."""
    from onnx import TensorProto, numpy_helper

    kinds = (TensorProto.FLOAT, TensorProto.DOUBLE)
    inline = TensorProto.DEFAULT
    if tensor.data_type not in kinds or tensor.data_type != wanted.data_type:
        return False
    if {tensor.data_location, wanted.data_location} != {inline} or tensor.dims != wanted.dims:
        return False
    bare = type(tensor)()
    bare.CopyFrom(tensor)
    bare.raw_data = wanted.raw_data
    if _bytes(bare) != _bytes(wanted) or len(tensor.raw_data) != len(wanted.raw_data):
        return False
    one, other = numpy_helper.to_array(tensor), numpy_helper.to_array(wanted)
    return bool((np.abs(one - other) <= LAST_DIGITS * np.abs(other)).all())


def _rename(function: FunctionProto) -> None:
    """Give a function's inner values names by their order. Changes `function`."""
    function.doc_string = ""
    del function.metadata_props[:]
    names = {name: name for name in (*function.input, "")}
    ends = dict.fromkeys(function.output)
    for node in function.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        for name in node.output:
            names.setdefault(name, name if name in ends else f"value_{len(names)}")
        for i, name in enumerate(node.output):
            node.output[i] = names[name]
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
