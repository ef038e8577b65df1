"""A folder's graph as a page runs it: logits where they are asked for, where the clamp fired."""

from __future__ import annotations

from typing import TYPE_CHECKING

from verify.engines.onnx_files import CLAMP_OPS
from verify.engines.onnx_head import with_rows
from verify.engines.onnx_runner import without_clamp

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

FIRED = "fired"
"""The output that says where any clamp fired: [batch, seq] float32, 1 or 0."""


def clamps_of(model: ModelProto) -> list[NodeProto]:
    """The nodes that clamp; none where the clamp is compiled or inlined."""
    return [node for node in model.graph.node if (node.domain, node.op_type) in CLAMP_OPS]


def clamped_graph(model: ModelProto) -> ModelProto:
    """A copy that forms logits at `ROWS` only, with the output `FIRED` where it holds a clamp.

    A clamp that does not fire passes the residual stream on as it is, so what it changed is where
    it fired.

    Args:
        model: a graph of bakeout's, without the data of its initializers.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    found = ModelProto()
    found.CopyFrom(with_rows(model) or model)
    clamps = clamps_of(found)
    if not clamps:
        return found
    import numpy as np

    last = numpy_helper.from_array(np.array([-1], np.int64), f"{FIRED}/last")
    found.graph.initializer.append(last)
    by_site = []
    for number, clamp in enumerate(clamps):
        name = f"{FIRED}/{number}"
        found.graph.node.extend(
            [
                helper.make_node("Equal", [clamp.output[0], clamp.input[0]], [f"{name}/same"]),
                helper.make_node("Not", [f"{name}/same"], [f"{name}/differs"]),
                helper.make_node(
                    "Cast", [f"{name}/differs"], [f"{name}/as_float"], to=TensorProto.FLOAT
                ),
                helper.make_node("ReduceMax", [f"{name}/as_float", last.name], [name], keepdims=0),
            ]
        )
        by_site.append(name)
    found.graph.node.append(helper.make_node("Max", by_site, [FIRED]))
    shape = ["batch_size", "sequence_length"]
    found.graph.output.append(helper.make_tensor_value_info(FIRED, TensorProto.FLOAT, shape))
    return found


def base_graph(model: ModelProto) -> ModelProto:
    """A copy with every clamp taken out, that forms logits at `ROWS` only: the base.

    Args:
        model: as for `clamped_graph`.
    """
    bare = without_clamp(model)
    return with_rows(bare) or bare
