"""A graph with the clamp's body in place of its nodes, for tools that know no ONNX functions."""

from __future__ import annotations

from pathlib import Path

import onnx

INLINED = "bakeout.inlined"
"""Key of the metadata that says so."""


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without functions, by ONNX's own inliner; it says of itself that it is."""
    from onnx.inliner import inline_local_functions

    flat: onnx.ModelProto = inline_local_functions(model, convert_version=False)
    kept = [entry for entry in flat.opset_import if entry.domain in ("", "com.microsoft")]
    del flat.opset_import[:]
    flat.opset_import.extend(kept)
    stated = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(flat, stated | {INLINED: "true"})
    return flat


def inline_file(graph: Path) -> None:
    """Inline a graph where it lies; its data stays as it is. Changes the file."""
    model = onnx.load(graph, load_external_data=False)
    graph.write_bytes(inlined(model).SerializeToString(deterministic=True))
