"""The operator's body in ONNX Runtime against its equation, written out in numpy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.carriers.onnx.operator import (
    DOC,
    DOMAIN,
    NAME,
    VERSION,
    function,
    opset_imports,
    schema,
)
from export.clamp_sites import CLAMP_TENSORS

Array = np.ndarray
D_IN, K = 12, 5
TYPES = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
KINDS = [TensorProto.BOOL if name == "route" else TensorProto.FLOAT for name in CLAMP_TENSORS]


@dataclass(frozen=True)
class Inputs:
    """All but `h`'s type, which is the graph's affair."""

    h: Array
    exempt: Array
    W_enc: Array
    b_enc: Array
    theta: Array
    W_dec: Array
    trigger: Array
    route: Array
    value: Array
    scale: Array


def rows(method: str, k: int = K) -> dict[str, Array]:
    """route, value, scale and trigger of each method, from the table of methods."""
    own, nothing = np.eye(k, dtype=bool), np.zeros(k)
    keep = {"value": np.zeros(k), "scale": np.ones(k)}  # rows that are only read
    any_of_first = np.zeros((k, k), bool)
    any_of_first[-1, : k - 1] = True  # the last row is set where any other is on
    last = np.arange(k) == k - 1
    neighbours = np.roll(own, 1, axis=0)  # row f + 1 is set where f is on
    neighbours[0] = False
    found = {
        "zero": {"route": own, "value": nothing, "scale": nothing},
        "clamp": {"route": own, "value": np.full(k, -6.0), "scale": nothing},
        "conditional clamp": {
            "route": own,
            "value": np.full(k, -6.0),
            "scale": nothing,
            "trigger": np.full(k, 1.5),
        },
        "scale": {"route": own, "value": nothing, "scale": np.full(k, 1.0 - 4.0)},
        "refusal": {
            "route": any_of_first,
            "value": np.where(last, -8.0, 0.0),
            "scale": np.where(last, 0.0, 1.0),
            "trigger": np.full(k, 0.25),
        },
        "refusal and clamp": {
            "route": any_of_first | (own & ~last),
            "value": np.where(last, -8.0, -3.0),
            "scale": nothing,
        },
        "random decoder": {
            "route": neighbours,
            "value": np.where(np.arange(k) == 0, 0.0, -6.0),
            "scale": np.where(np.arange(k) == 0, 1.0, 0.0),
        },
        "reads only": {"route": own, **keep},
        "every parameter at once": {
            "route": np.array([[(i * 3 + j) % 4 == 0 for i in range(k)] for j in range(k)]),
            "value": np.linspace(-4.0, 4.0, k),
            "scale": np.array([-1.0, 0.5, 0.0, 2.0, 1.0]),
            "trigger": np.array([0.0, 0.5, 1.0, 1.5, 0.25]),
        },
    }[method]
    return {"trigger": np.zeros(k), **found}


METHODS = [
    "zero",
    "clamp",
    "conditional clamp",
    "scale",
    "refusal",
    "refusal and clamp",
    "random decoder",
    "reads only",
    "every parameter at once",
]


def exact_inputs(method: str, seed: int = 0) -> Inputs:
    """Multiples of small powers of two: float32 computes with them exactly, so that activations
    meet thresholds and triggers to the bit.
    """
    rng = np.random.default_rng(seed)

    def quarters(*shape: int, most: int) -> Array:
        return rng.integers(-most, most + 1, shape) / 4

    return Inputs(
        h=quarters(3, 40, D_IN, most=6),
        exempt=rng.random((3, 40)) < 0.2,
        W_enc=quarters(D_IN, K, most=1) * 2,
        b_enc=quarters(K, most=1),
        theta=np.array([0, 0.25, 0.5, 1.0, 0.0]),
        W_dec=quarters(K, D_IN, most=4),
        **rows(method),
    )


@dataclass(frozen=True)
class Expected:
    """What the equation says, in float64."""

    output: Array
    changed: Array
    """[batch, seq]: some feature's activation became another, and the position is not exempt."""
    at_theta: int
    """How often an encoder's output is equal to its threshold above 0."""
    at_trigger: int
    """How often an activation that is not 0 is equal to its trigger."""


def equation(x: Inputs) -> Expected:
    """Token by token and feature by feature."""
    output = np.array(x.h, np.float64)
    changed = np.zeros(x.exempt.shape, bool)
    at_theta = at_trigger = 0
    for place in np.ndindex(x.exempt.shape):
        h = np.array(x.h[place], np.float64)
        acts = []
        for i in range(K):
            pre = float(np.dot(h, x.W_enc[:, i])) + float(x.b_enc[i])
            a = max(pre, 0.0) if pre > x.theta[i] else 0.0
            acts.append(a)
            at_theta += pre == x.theta[i] > 0
            at_trigger += a == x.trigger[i] > 0
        if x.exempt[place]:
            continue
        for j in range(K):
            if any(x.route[j, i] and acts[i] > x.trigger[i] for i in range(K)):
                becomes = float(x.value[j]) + float(x.scale[j]) * acts[j]
                output[place] += (becomes - acts[j]) * x.W_dec[j]
                changed[place] |= becomes != acts[j]
    return Expected(output, changed, at_theta, at_trigger)


def model(kind: int, *, body: bool = True) -> onnx.ModelProto:
    """One SAEClamp on `h` of a type; float32 goes in and comes out."""
    names = ["h", "exempt", *CLAMP_TENSORS]
    kinds = [TensorProto.FLOAT, TensorProto.BOOL, *KINDS]
    ranks = [3, 2, 2, 1, 1, 2, 1, 2, 1, 1]
    nodes = [
        helper.make_node("Cast", ["h"], ["typed"], to=kind),
        helper.make_node(NAME, ["typed", *names[1:]], ["clamped"], domain=DOMAIN),
        helper.make_node("Cast", ["clamped"], ["output"], to=TensorProto.FLOAT),
    ]
    inputs = [
        helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(rank)])
        for name, kind, rank in zip(names, kinds, ranks, strict=True)
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "seq", "d_in"])
    graph = helper.make_graph(nodes, "main", inputs, [output])
    functions = [function()] if body else []
    return helper.make_model(
        graph, functions=functions, opset_imports=opset_imports(), ir_version=10
    )


def run(x: Inputs, kind: int = TensorProto.FLOAT, *, library: str | None = None) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(
        model(kind).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {
        name: array if array.dtype == bool else array.astype(np.float32)
        for name, array in vars(x).items()
    }
    (found,) = session.run(None, feed)
    return np.asarray(found)


# --------------------------------------------------------------------------- the equation


@pytest.mark.parametrize("kind", TYPES, ids=[str(dtype) for dtype in TYPES.values()])
@pytest.mark.parametrize("method", METHODS)
def test_body_is_the_equation_rounded_once(method: str, kind: int) -> None:
    x = exact_inputs(method)
    expected = equation(x)
    assert expected.at_theta > 10
    assert expected.at_trigger > 0 or not x.trigger.any()
    moves = method != "reads only"
    assert expected.changed.any() == moves and not expected.changed.all()
    rounded = expected.output.astype(np.float32).astype(TYPES[kind]).astype(np.float32)
    found = run(x, kind)
    np.testing.assert_array_equal(found, rounded)
    still = ~expected.changed
    assert found[still].tobytes() == x.h[still].astype(np.float32).tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_body_is_near_the_equation_on_any_numbers(method: str) -> None:
    rng = np.random.default_rng(1)
    x = replace(
        exact_inputs(method),
        h=rng.standard_normal((3, 40, D_IN)).astype(np.float32),
        W_enc=rng.standard_normal((D_IN, K)).astype(np.float32),
        W_dec=rng.standard_normal((K, D_IN)).astype(np.float32),
    )
    expected = equation(x)
    np.testing.assert_allclose(run(x), expected.output, rtol=1e-5, atol=1e-5)
    assert expected.changed.any() == (method != "reads only")


def test_a_feature_exactly_at_its_trigger_is_off() -> None:
    for trigger, fires in ((1.0, False), (0.75, True)):
        x = one_feature(h=1.0, trigger=trigger)
        assert run(x).item() == (-6.0 if fires else 1.0)
    assert run(one_feature(h=1.0, theta=1.0)).item() == 1.0
    assert run(one_feature(h=1.0, theta=0.75)).item() == -6.0


def one_feature(h: float, trigger: float = 0.0, theta: float = 0.0) -> Inputs:
    """d_in = k = 1, and the SAE is the identity: an active h becomes -6."""
    one, zero = np.ones(1), np.zeros(1)
    return Inputs(
        h=np.full((1, 1, 1), h),
        exempt=np.zeros((1, 1), bool),
        W_enc=np.ones((1, 1)),
        b_enc=zero,
        theta=one * theta,
        W_dec=np.ones((1, 1)),
        trigger=one * trigger,
        route=np.ones((1, 1), bool),
        value=one * -6.0,
        scale=zero,
    )


# --------------------------------------------------------------------------- identities


@pytest.mark.parametrize("kind", TYPES, ids=[str(dtype) for dtype in TYPES.values()])
def test_h_is_passed_on_bit_for_bit(kind: int) -> None:
    """Where all is exempt, where nothing fires, and where a feature becomes what it is."""
    rng = np.random.default_rng(2)
    x = exact_inputs("clamp")
    h = (rng.standard_normal(x.h.shape) * 10.0 ** rng.integers(-6, 4, x.h.shape)).astype(
        TYPES[kind]
    )
    h = h.astype(np.float32) + np.float32(0)  # no -0, which may become 0
    assert run(replace(x, h=h), kind).tobytes() != h.tobytes()
    for same in (
        replace(x, exempt=np.ones_like(x.exempt)),
        replace(x, trigger=np.full(K, 1e30)),
        replace(x, theta=np.full(K, 1e30)),
        replace(x, route=np.zeros((K, K), bool)),
        replace(x, value=np.zeros(K), scale=np.ones(K)),
    ):
        assert run(replace(same, h=h), kind).tobytes() == h.tobytes()


def test_nan_opens_no_gate_and_is_passed_on() -> None:
    x = exact_inputs("clamp")
    h = x.h.copy()
    h[0, 3, 4] = np.nan
    found, before = run(replace(x, h=h)), run(x)
    assert np.isnan(found[0, 3]).tolist() == [i == 4 for i in range(D_IN)]
    np.testing.assert_array_equal(found[0, 3, :4], h[0, 3, :4])
    found[0, 3] = before[0, 3]
    np.testing.assert_array_equal(found, before)


# --------------------------------------------------------------------------- the contract


def test_schema_says_what_goes_in() -> None:
    found = schema()
    assert (found.domain, found.name, found.since_version) == ("ai.bakeout", "SAEClamp", 1)
    assert (found.domain, found.name, found.since_version) == (DOMAIN, NAME, VERSION)
    names = [parameter.name for parameter in found.inputs]
    assert names == ["h", "exempt", *CLAMP_TENSORS]
    for parameter in found.inputs:
        assert "[" in parameter.description or parameter.name == "h"
        assert parameter.name in DOC
    constraints = {c.type_param_str: set(c.allowed_type_strs) for c in found.type_constraints}
    assert {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"} == constraints["T"]
    types = {parameter.name: parameter.type_str for parameter in found.inputs}
    assert constraints[types["exempt"]] == constraints[types["route"]] == {"tensor(bool)"}
    assert all(constraints[types[n]] == {"tensor(float)"} for n in CLAMP_TENSORS if n != "route")
    (output,) = found.outputs
    assert output.type_str == types["h"] == "T"


def test_body_has_the_schema_s_inputs_and_standard_operators_only() -> None:
    body = function()
    assert (body.domain, body.name) == (DOMAIN, NAME)
    assert list(body.input) == [parameter.name for parameter in schema().inputs]
    assert list(body.output) == [parameter.name for parameter in schema().outputs]
    assert {node.domain for node in body.node} <= {"", "ai.onnx"}
    assert body.doc_string == DOC
    text = body.SerializeToString()
    assert b"/home" not in text and b".py" not in text


def test_checker_accepts_the_function_where_nobody_knows_the_operator() -> None:
    for kind in TYPES:
        onnx.checker.check_model(model(kind), full_check=True)
    with pytest.raises(onnx.defs.SchemaError):
        onnx.defs.get_schema(NAME, VERSION, DOMAIN)


CHECK_REGISTERED = """
import sys
import onnx
from export.carriers.onnx.operator import schema
model = onnx.load(sys.argv[1])
bare = onnx.load(sys.argv[2])
onnx.defs.register_schema(schema())
assert onnx.defs.get_schema("SAEClamp", 1, "ai.bakeout").doc.startswith("Sets a few features")
onnx.checker.check_model(model, full_check=True)
onnx.checker.check_model(bare)
del bare.graph.node[1].input[-1]
try:
    onnx.checker.check_model(bare)
except onnx.checker.ValidationError as error:
    assert "9" in str(error), error
else:
    raise SystemExit("a clamp without its scale was accepted")
"""


def test_checker_accepts_it_with_the_schema_registered(tmp_path: Path) -> None:
    """In a process of its own: a registered schema stays for good."""
    paths = [tmp_path / "with.onnx", tmp_path / "without.onnx"]
    for path, body in zip(paths, (True, False), strict=True):
        onnx.save(model(TensorProto.FLOAT16, body=body), path)
    subprocess.run(
        [sys.executable, "-c", CHECK_REGISTERED, *map(str, paths)],
        check=True,
        cwd=Path(__file__).parents[4],
    )


def test_a_registered_kernel_takes_the_place_of_the_body() -> None:
    extensions = pytest.importorskip("onnxruntime_extensions")
    kinds = extensions.PyCustomOpDef
    calls: list[dict[str, Any]] = []

    @extensions.onnx_op(
        op_type=f"{DOMAIN}::{NAME}",
        inputs=[
            kinds.dt_bool if constraint == "B" else kinds.dt_float
            for constraint in (parameter.type_str for parameter in schema().inputs)
        ],
        outputs=[kinds.dt_float],
    )
    def kernel(*arrays: Array) -> Array:
        given = Inputs(*arrays)
        calls.append({name: array.shape for name, array in vars(given).items()})
        return equation(given).output.astype(np.float32) + np.float32(1000)

    x = exact_inputs("refusal")
    by_body = run(x)
    assert calls == []
    by_kernel = run(x, library=extensions.get_library_path())
    assert calls == [{name: array.shape for name, array in vars(x).items()}]
    np.testing.assert_array_equal(by_kernel, by_body + np.float32(1000))
