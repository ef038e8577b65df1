"""`SAETopKClamp`'s body in ONNX Runtime against the equation of `DOC`, one position at a time."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.carriers.onnx import topk_operator
from export.carriers.onnx.operator import DOMAIN, opset_imports
from export.carriers.onnx.topk_operator import CHUNK, NAME, topk_function, topk_schema

D_IN, K = 6, 3
NAMES = (
    *("h", "exempt", "W_enc", "b_enc", "gain", "W_dec", "trigger", "route", "value", "scale"),
    "topk",
)
Feed = dict[str, np.ndarray]


def inputs(d_sae: int, topk: int, seed: int = 0) -> Feed:
    """Quarters and small whole numbers: products and sums are exact, and ties are ties."""
    rng = np.random.default_rng(seed)

    def quarters(*shape: int) -> np.ndarray:
        return (rng.integers(-6, 7, shape) / 4).astype(np.float32)

    return {
        "h": quarters(2, 9, D_IN),
        "exempt": rng.random((2, 9)) < 0.2,
        "W_enc": quarters(D_IN, d_sae),
        "b_enc": quarters(d_sae),
        "gain": rng.choice(np.array([0.5, 1, 2], np.float32), d_sae),
        "W_dec": quarters(K, D_IN),
        "trigger": np.full(K, 0.25, np.float32),
        "route": np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], np.bool_),
        "value": np.array([-3, 2, 5], np.float32),
        "scale": np.array([0, 0.5, 0], np.float32),
        "topk": np.array([topk], np.int64),
    }


def equation(x: Feed) -> np.ndarray:
    output = x["h"].astype(np.float64)
    for place in np.ndindex(x["exempt"].shape):
        h, topk = x["h"][place].astype(np.float64), int(x["topk"][0])
        pre = (h @ x["W_enc"].astype(np.float64)) * x["gain"] + x["b_enc"]
        least = sorted(pre.tolist(), reverse=True)[topk - 1]
        acts = [max(p, 0.0) if p >= least else 0.0 for p in pre[:K].tolist()]
        if x["exempt"][place]:
            continue
        for j in range(K):
            if any(x["route"][j, i] and acts[i] > x["trigger"][i] for i in range(K)):
                becomes = float(x["value"][j]) + float(x["scale"][j]) * acts[j]
                output[place] += (becomes - acts[j]) * x["W_dec"][j]
    return output


def run(x: Feed, kind: int = TensorProto.FLOAT) -> np.ndarray:
    types = {np.dtype(np.bool_): TensorProto.BOOL, np.dtype(np.int64): TensorProto.INT64}
    infos = [
        helper.make_tensor_value_info(
            name,
            types.get(x[name].dtype, TensorProto.FLOAT),
            [f"{name}_{axis}" for axis in range(x[name].ndim)],
        )
        for name in NAMES
    ]
    nodes = [
        helper.make_node("Cast", ["h"], ["typed"], to=kind),
        helper.make_node(NAME, ["typed", *NAMES[1:]], ["clamped"], domain=DOMAIN),
        helper.make_node("Cast", ["clamped"], ["output"], to=TensorProto.FLOAT),
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "seq", "d_in"])
    graph = helper.make_graph(nodes, "main", infos, [output])
    model = helper.make_model(
        graph, functions=[topk_function()], opset_imports=opset_imports(), ir_version=10
    )
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, x)[0])


@pytest.mark.parametrize(
    ("d_sae", "topk"),
    [(K, 1), (K, K), (40, 1), (40, 7), (40, 40), (CHUNK, 9), (CHUNK + 1, 9), (2 * CHUNK + 5, 64)],
)
def test_body_is_the_equation(d_sae: int, topk: int) -> None:
    x = inputs(d_sae, topk, seed=d_sae + topk)
    np.testing.assert_array_equal(run(x), equation(x).astype(np.float32))


def test_more_may_be_active_than_are_looked_at_together() -> None:
    x = inputs(2 * CHUNK + 5, CHUNK + 9)
    np.testing.assert_array_equal(run(x), equation(x).astype(np.float32))
    changed = (equation(x) != x["h"]).any(axis=-1)
    assert changed.any()


def test_ties_are_all_active() -> None:
    x = inputs(40, 5)
    x["W_enc"][:, 1:] = x["W_enc"][:, :1]  # every feature is the same as the first
    x["b_enc"][:], x["gain"][:] = 1.0, 1.0
    assert (equation(x) != x["h"]).any()
    np.testing.assert_array_equal(run(x), equation(x).astype(np.float32))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_the_output_is_rounded_once(kind: int) -> None:
    x = inputs(40, 7)
    expected = equation(x).astype(np.float32)
    rounded = expected.astype(np.float16) if kind == TensorProto.FLOAT16 else expected
    np.testing.assert_array_equal(run(x, kind), rounded.astype(np.float32))


def test_the_schema_names_the_inputs_of_the_body() -> None:
    schema = topk_schema()
    assert (schema.name, schema.domain, schema.since_version) == (NAME, DOMAIN, 1)
    assert [of.name for of in schema.inputs] == list(NAMES) == list(topk_function().input)
    assert topk_function().doc_string == topk_operator.DOC
