"""OpenVINO, through its own reader of ONNX."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.clients.cells import Client, Said, Way, rows
from tests.clients.onnx_clients.onnxruntime_client import GRAPHS, feed, graph_of

_INLINED = ", its function inlined by onnx.inliner"


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import openvino as ov

    path = graph_of(way, folders)
    with TemporaryDirectory() as scratch:
        if _INLINED in way.dtype:
            path = _inlined(path, Path(scratch))
        model = ov.Core().read_model(path)
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    past = {
        one.any_name: (
            [0, one.partial_shape[1].get_length(), 0, one.partial_shape[3].get_length()],
            one.element_type == ov.Type.f16,
        )
        for one in compiled.inputs
        if one.any_name.startswith("past_key_values")
    }
    names = {one.any_name for one in compiled.inputs}
    return rows(
        [
            compiled({name: of for name, of in feed(ids, past).items() if name in names})["logits"][
                0
            ]
            for ids in prompts
        ]
    )


def _inlined(graph: Path, scratch: Path) -> Path:
    """The graph without functions, beside its data: OpenVINO follows no symbolic link."""
    import onnx
    from onnx.inliner import inline_local_functions

    for data in graph.parent.iterdir():
        if data.suffix == ".safetensors" or data.name == f"{graph.name}_data":
            try:
                (scratch / data.name).hardlink_to(data)
            except OSError:  # another disk
                shutil.copy(data, scratch / data.name)
    model = onnx.load(graph, load_external_data=False)
    path = scratch / "inlined.onnx"
    path.write_bytes(inline_local_functions(model).SerializeToString())
    return path


CLIENT = Client(
    "OpenVINO",
    ("openvino",),
    (
        *(Way("onnx", name) for name in GRAPHS),
        *(Way("onnx", f"{name}{_INLINED}") for name in GRAPHS),
    ),
    say,
)
