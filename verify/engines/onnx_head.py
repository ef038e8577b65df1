"""A graph that forms logits where they are asked for, instead of everywhere.

Of a quarter of a million tokens the output matrix is most of the work. Nothing else of the graph is
touched: of what goes into that matrix, some rows are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

ROWS = "logit_rows"
"""The input that says at which tokens: [n] int64, counted row by row through the batch."""
_MATRICES = ("Gemm", "MatMul", "MatMulNBits")
_ELEMENTWISE = ("Cast", "Div", "Tanh", "Mul")
"""What may stand between the matrix and the logits: the soft cap."""


def with_rows(model: ModelProto) -> ModelProto | None:
    """A copy with the input `ROWS`, whose logits are [n, vocab]; None where the graph does not end
    exactly as bakeout's do: rows of tokens, the matrix, the soft cap by constants, and a reshape to
    the shape of `input_ids` and what is left. What is taken out is thereby known.
    """
    from onnx import ModelProto, TensorProto, helper

    constants = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL
    }
    nodes = list(model.graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    last = nodes[makers["logits"]] if "logits" in makers else None
    if last is None or not _is_reshape_to_tokens(last, nodes, makers, constants):
        return None
    rows = last.input[0]
    at = makers.get(rows)
    while at is not None and nodes[at].op_type in _ELEMENTWISE:
        if not set(nodes[at].input[1:]) <= constants.keys():
            return None
        at = makers.get(nodes[at].input[0])
    if at is None or nodes[at].op_type not in _MATRICES:
        return None
    found = ModelProto()
    found.CopyFrom(model)
    node = found.graph.node[at]
    gather = helper.make_node("Gather", [node.input[0], ROWS], [f"{ROWS}/taken"], axis=0)
    node.input[0] = gather.output[0]
    end = found.graph.node[makers["logits"]]
    end.CopyFrom(helper.make_node("Identity", [rows], ["logits"]))
    found.graph.node.insert(at, gather)
    found.graph.input.append(helper.make_tensor_value_info(ROWS, TensorProto.INT64, ["n"]))
    shape = next(value for value in found.graph.output if value.name == "logits").type.tensor_type
    vocab = shape.shape.dim[-1].dim_value
    del shape.shape.dim[:]
    shape.shape.dim.add().dim_param = "n"
    shape.shape.dim.add().dim_value = vocab
    return found


def _is_reshape_to_tokens(
    node: NodeProto,
    nodes: Sequence[NodeProto],
    makers: Mapping[str, int],
    constants: Mapping[str, TensorProto],
) -> bool:
    """Whether a node does this and nothing else: [tokens, vocab] → [batch, seq, vocab]."""
    from onnx import numpy_helper

    if node.op_type != "Reshape" or node.attribute or node.input[1] not in makers:
        return False
    joined = nodes[makers[node.input[1]]]
    if joined.op_type != "Concat" or len(joined.input) != 2 or joined.input[0] not in makers:
        return False
    shape, rest = nodes[makers[joined.input[0]]], constants.get(joined.input[1])
    plain = shape.op_type == "Shape" and list(shape.input) == ["input_ids"] and not shape.attribute
    return plain and rest is not None and numpy_helper.to_array(rest).tolist() == [-1]
