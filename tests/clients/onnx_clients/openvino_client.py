"""OpenVINO, through its own reader of ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.cells import Client, Said, Way, rows
from tests.clients.onnx_clients.onnxruntime_client import GRAPHS, feed, graph_of

_INLINED = ", its function inlined by onnx.inliner"


def say(way: Way, folders: Mapping[str, Path], prompts: Sequence[list[int]]) -> Sequence[Said]:
    """See `Client.say`."""
    import openvino as ov

    path = graph_of(way, folders)
    inlined = path.with_name(f"{path.stem}.inlined.onnx")
    try:
        if _INLINED in way.dtype:
            import onnx
            from onnx.inliner import inline_local_functions

            model = onnx.load(path, load_external_data=False)
            inlined.write_bytes(inline_local_functions(model).SerializeToString())
            path = inlined
        compiled = ov.Core().compile_model(
            ov.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
    finally:
        inlined.unlink(missing_ok=True)
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


CLIENT = Client(
    "OpenVINO",
    ("openvino",),
    (
        *(Way("onnx", name) for name in GRAPHS),
        *(Way("onnx", f"{name}{_INLINED}") for name in GRAPHS),
    ),
    say,
)
