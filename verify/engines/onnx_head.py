"""A graph that forms logits where they are asked for, instead of everywhere.

Of a quarter of a million tokens the output matrix is most of the work. Nothing else of the graph is
touched: of what goes into that matrix, some rows are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

ROWS = "logit_rows"
"""The input that says at which tokens: [n] int64, counted row by row through the batch."""
_MATRICES = ("Gemm", "MatMul", "MatMulNBits")
_ELEMENTWISE = ("Cast", "Div", "Tanh", "Mul")
"""What may stand between the matrix and the logits: the soft cap."""


def with_rows(model: ModelProto) -> ModelProto | None:
    """A copy with the input `ROWS`, whose logits are [n, vocab]; None where the graph does not end
    as bakeout's do: rows of tokens, the matrix, the soft cap, a reshape.
    """
    from onnx import ModelProto, TensorProto, helper

    nodes = list(model.graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    last = nodes[makers["logits"]] if "logits" in makers else None
    if last is None or last.op_type != "Reshape":
        return None
    rows = last.input[0]
    at = makers.get(rows)
    while at is not None and nodes[at].op_type in _ELEMENTWISE:
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
