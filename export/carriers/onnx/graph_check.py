"""A graph as a stranger meets it: checked and run in a process that knows nothing of bakeout.

Started by path with `python -I`; needs numpy, onnx and onnxruntime only. Arguments: the graph, an
.npz with input_ids, attention_mask, places and token_ids, and the .npz to write: `logits` and
`unclamped` [m, w] float32, the second with every clamp taken out; `n_clamps`. Ends with exit code
1 and one line on stderr when the graph does not hold.

The graph is run layer by layer, and the head at the asked places only, so that a model of any size
needs the memory of one layer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper

DOMAIN, OPERATORS = "ai.bakeout", ("SAEClamp", "SAETopKClamp")
Values = dict[str, Any]
"""Arrays by the names that they have in the graph."""


def segments(nodes: list[NodeProto]) -> list[list[NodeProto]]:
    """The graph's nodes in order, cut before each layer and before each part of the head."""
    parts: list[list[NodeProto]] = [[]]
    current = ""
    for node in nodes:
        scope = node.name.partition("/")[0] if "/" in node.name else current
        if scope != current and scope.startswith(("layer.", "head")):
            parts.append([])
        current = scope
        parts[-1].append(node)
    return parts


def segment_model(
    model: ModelProto, nodes: list[NodeProto], given: Values, wanted: set[str]
) -> ModelProto:
    """Some nodes as a model of their own.

    Args:
        model: that they are from.
        nodes: in order.
        given: what was computed before.
        wanted: what others need.
    """
    produced = {name for node in nodes for name in node.output}
    consumed = {name for node in nodes for name in node.input}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
        )
        for name, array in given.items()
        if name in consumed
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in sorted(produced & wanted)]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in consumed]
    graph = helper.make_graph(nodes, "segment", inputs, outputs, weights)
    return helper.make_model(
        graph,
        functions=list(model.functions),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )


def without_clamp(model: ModelProto) -> ModelProto:
    """The same graph with Identity in place of every clamp."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if node.domain == DOMAIN:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    return bare


def run(model: ModelProto, folder: Path, given: Values) -> Values:
    """One model's outputs; nothing of it is rewritten or kept."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: given[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feed), strict=True))


def inputs(model: ModelProto, asked: Values) -> Values:
    """The graph's inputs: the prompts, and a cache of nothing."""
    ids, mask = asked["input_ids"], asked["attention_mask"]
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(-1) - 1, 0),
    }
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            kind = value.type.tensor_type
            heads, width = (kind.shape.dim[axis].dim_value for axis in (1, 3))
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            given[value.name] = np.zeros((len(ids), heads, 0, width), dtype)
    return given


def logits(path: Path, model: ModelProto, asked: Values) -> tuple[Any, Any]:
    """[m, w] at the places and vocabulary entries that are asked for, clamped and not."""
    parts = segments(list(model.graph.node))
    clamped = inputs(model, asked)
    bare = dict(clamped)
    for index, nodes in enumerate(parts):
        if nodes[0].name.startswith("head/"):
            clamped, bare = at_places(clamped, asked["places"]), at_places(bare, asked["places"])
        later = {name for part in parts[index + 1 :] for node in part for name in node.input}
        segment = segment_model(model, nodes, clamped, later | {"logits"})
        bare |= run(without_clamp(segment), path.parent, bare)
        clamped |= run(segment, path.parent, clamped)
        for given in (clamped, bare):
            for name in given.keys() - later - {"logits"}:
                del given[name]
    kept = asked["token_ids"]
    return (
        np.take_along_axis(clamped["logits"][0], kept, -1),
        np.take_along_axis(bare["logits"][0], kept, -1),
    )


def at_places(given: Values, places: Any) -> Values:
    """What the head is given, for some tokens only, as if they were one sequence.

    Args:
        given: the residual stream [batch * seq, d_in], and input_ids for their shape.
        places: [m, 2], row and column.
    """
    rows, columns = places.T
    ids = given["input_ids"]
    flat = rows * ids.shape[1] + columns
    return {
        name: ids[rows, columns][None] if name == "input_ids" else array[flat]
        for name, array in given.items()
        if name == "input_ids" or (array.ndim == 2 and len(array) == ids.size)
    }


def main(graph: str, request: str, answer: str) -> None:
    """Check and run one graph."""
    path = Path(graph)
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    n_clamps = sum(of.domain == DOMAIN and of.op_type in OPERATORS for of in model.graph.node)
    with np.load(request) as asked:
        found, unclamped = logits(path, model, dict(asked))
    np.savez(answer, n_clamps=n_clamps, logits=found, unclamped=unclamped)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # whatever it is, the other side says it in one line
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
