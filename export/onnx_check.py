"""A graph as a stranger meets it: checked and run in a process that knows nothing of bakeout.

Started by path with `python -I`; needs numpy, onnx and onnxruntime only. Arguments: the graph, an
.npz with input_ids, attention_mask, places and token_ids, and the .npz to write: `logits` and
`unclamped` [m, w] float32, the second with every clamp taken out; `n_clamps`. Ends with exit code
1 and one line on stderr when the graph does not hold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

DOMAIN, OPERATOR = "ai.bakeout", "SAEClamp"


def without_clamp(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with Identity in place of every clamp."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if node.domain == DOMAIN:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    del bare.functions[:]
    return bare


def logits(path: Path, model: onnx.ModelProto, asked: Any) -> Any:
    """[m, w] at the places and vocabulary entries that are asked for.

    Weights are not rewritten, so that a model needs little more memory than its largest matrix.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ids, mask = asked["input_ids"], asked["attention_mask"]
    feed = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(-1) - 1, 0),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            feed[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), kind)
    (found,) = session.run(["logits"], feed)
    rows, columns = asked["places"].T
    return np.take_along_axis(found[rows, columns], asked["token_ids"], -1)


def main(graph: str, request: str, answer: str) -> None:
    """Check and run one graph."""
    path = Path(graph)
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    with np.load(request) as asked:
        np.savez(
            answer,
            n_clamps=sum(
                node.domain == DOMAIN and node.op_type == OPERATOR for node in model.graph.node
            ),
            logits=logits(path, model, asked),
            unclamped=logits(path, without_clamp(model), asked),
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # whatever it is, the other side says it in one line
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
