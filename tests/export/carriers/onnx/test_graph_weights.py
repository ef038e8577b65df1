"""Rounded weights against naive arithmetic, and what ONNX Runtime makes of the packed bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from bake.errors import OutputError
from bake.tensors import StoredTensor
from export.carriers.onnx.graph_builder import Builder
from export.carriers.onnx.graph_weights import (
    ALIGNMENT,
    BLOCK,
    PackedWeights,
    SharedWeights,
    Weights,
    packed_size,
    quantize,
)
from export.carriers.onnx.operator import opset_imports
from export.carriers.onnx.precisions import PRECISIONS, precision_of

Array = np.ndarray
TABLE, HEAD, PROJECTION = "model.embed_tokens.weight", "lm_head.weight", "model.q_proj.weight"


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def naive_rounding(row: Array, bits: int) -> Array:
    """One row [k], block by block and number by number: the values that the codes stand for."""
    middle = 2 ** (bits - 1)
    found = []
    for start in range(0, len(row), 32):
        block = [float(w) for w in row[start : start + 32]]
        far = max(block, key=abs)
        scale = float(np.float32(far / -middle))
        for w in block:
            code = middle if scale == 0 else min(2 * middle - 1, max(0, round(w / scale) + middle))
            found.append((code - middle) * scale)
    return np.array(found)


def unpack(codes: Array, scales: Array, bits: int, k: int) -> Array:
    """[n, blocks, bytes] -> [n, k], as the layout of MatMulNBits says."""
    n = len(codes)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, codes.shape[1], -1)
    middle = 2 ** (bits - 1)
    values = (codes.astype(np.float64) - middle) * scales[..., None].astype(np.float64)
    return values.reshape(n, -1)[:, :k]


def stored(
    folder: Path, arrays: dict[str, Array], dtype: str | None = None
) -> dict[str, StoredTensor]:
    """Arrays in a safetensors file, found by its header. dtype BF16: stored as its upper halves."""
    path = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        begin, end = entry["data_offsets"]
        found[name] = StoredTensor(
            path, dtype or entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin
        )
    return found


Write = Callable[[Builder, Weights], str]


def model(write: Write, weights: Weights, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A graph over input `x`, of a type, and output `y`, float32."""
    g = Builder()
    y = write(g, weights)
    nodes = [*g.nodes, helper.make_node("Identity", [y], ["y"])]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", kind, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(g.initializers.values()),
    )
    imports = [*opset_imports(), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def run(proto: onnx.ModelProto, folder: Path, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def packed(
    tensors: dict[str, StoredTensor],
    precision: str,
    folder: Path,
    write: Write,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    with (folder / "data").open("wb") as data:
        return model(write, PackedWeights(tensors, PRECISIONS[precision], data, "data"), kind)


# --------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 31, 32, 40, 96])
def test_quantize_is_naive_rounding(bits: int, k: int) -> None:
    rows = random(7, k, seed=k)
    rows[1] = 0.0
    rows[2, : k // 2] = 0.0
    rows[3] *= 1e-20
    rows[4] *= 1e20
    rows[5] = -rows[6]
    codes, scales = quantize(rows, bits)
    n_blocks = -(-k // 32)
    assert codes.dtype == np.uint8 and codes.shape == (7, n_blocks, 32 * bits // 8)
    assert scales.dtype == np.float32 and scales.shape == (7, n_blocks)
    found = unpack(codes, scales, bits, k)
    expected = np.stack([naive_rounding(row, bits) for row in rows])
    size = np.abs(rows).max(axis=1, keepdims=True)
    # A number halfway between two codes may go either way.
    step = np.repeat(np.abs(scales), 32, axis=1)[:, :k]
    same = np.abs(found - expected) <= 1e-6 * size
    assert same.mean() > 0.99
    assert np.all(np.abs(found - rows) <= step * 1.0001)
    halves = np.abs(found - rows) <= step * 0.5001
    assert halves.mean() > 0.9  # all but what lies opposite to the far end
    np.testing.assert_array_equal(found[1], 0.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_s_largest_value_is_exact(bits: int) -> None:
    rows = random(50, 64, seed=3)
    found = unpack(*quantize(rows, bits), bits, 64).reshape(50, 2, 32)
    blocks = rows.reshape(50, 2, 32)
    far = np.abs(blocks).argmax(-1)[..., None]
    np.testing.assert_allclose(
        np.take_along_axis(found, far, -1), np.take_along_axis(blocks, far, -1), rtol=1e-6
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_next_to_nothing_round_to_nothing(bits: int) -> None:
    for size in (1e-37, 1e-38, 1e-39, 1e-42, 1e-45):
        rows = np.linspace(-size, size, 32, dtype=np.float32)[None]
        with np.errstate(all="raise", under="ignore"):
            found = unpack(*quantize(rows, bits), bits, 32)
        assert np.abs(found - rows).max() <= max(size / 2 ** (bits - 1), 2e-37)


# --------------------------------------------------------------------------- in ONNX Runtime


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("k", [32, 40, 96])
def test_matmul_of_packed_blocks(tmp_path: Path, precision: str, k: int) -> None:
    matrix = random(24, k, seed=1)
    tensors = stored(tmp_path, {PROJECTION: matrix})
    proto = packed(tensors, precision, tmp_path, lambda g, w: w.linear(g, "x", PROJECTION))
    bits = 8 if precision == "int8" else 4
    rounded = np.stack([naive_rounding(row, bits) for row in matrix])
    # One column at a time: activations are rounded to 8 bits by the kernel, and 1 stays 1.
    found = run(proto, tmp_path, np.eye(k, dtype=np.float32))
    np.testing.assert_allclose(found, rounded.T, atol=2e-5 * np.abs(matrix).max())
    x = random(5, k, seed=2)
    exact = x @ rounded.T
    assert np.abs(run(proto, tmp_path, x) - exact).max() < 0.03 * np.abs(exact).max()
    assert np.abs(x @ matrix.T - exact).max() > 1e-3  # the matrix was rounded


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("width", [32, 64, 40])
def test_table_and_tied_head(tmp_path: Path, precision: str, width: int) -> None:
    """8 bits in both, and the same bytes for both where the width allows it."""
    table = random(50, width, seed=4)
    tensors = stored(tmp_path, {TABLE: table})
    ids = np.array([[3, 49, 0], [7, 7, 21]])
    rounded = np.stack([naive_rounding(row, 8) for row in table])

    def both(g: Builder, w: Weights) -> str:
        rows = g.op("Reshape", w.lookup(g, TABLE, "x"), g.ints(-1, width))
        eye = g.constant(np.eye(width, dtype=np.float32))
        columns = g.op("Transpose", w.linear(g, eye, TABLE), perm=[1, 0])
        return g.op("Concat", rows, columns, axis=0)

    proto = packed(tensors, precision, tmp_path, both, TensorProto.INT64)
    found = run(proto, tmp_path, ids)
    looked_up = table.astype(np.float16) if width % 32 else rounded
    np.testing.assert_allclose(
        found[:6], looked_up[ids.flatten()].astype(np.float64), atol=1e-6, rtol=1e-6
    )
    np.testing.assert_allclose(found[6:], rounded, atol=1e-4)
    if width % 32 == 0:
        size = (tmp_path / "data").stat().st_size
        assert size == ALIGNMENT + 4 * 50 * (width // 32)  # codes, then scales, once each


def test_an_untied_head_has_the_bits_that_were_asked_for(tmp_path: Path) -> None:
    matrix = random(24, 64)
    tensors = stored(tmp_path, {HEAD: matrix, TABLE: random(24, 64, seed=1)})

    def write(g: Builder, w: Weights) -> str:
        w.lookup(g, TABLE, g.ints(0))
        return w.linear(g, "x", HEAD)

    proto = packed(tensors, "int4", tmp_path, write)
    found = run(proto, tmp_path, np.eye(64, dtype=np.float32))
    rounded = np.stack([naive_rounding(row, 4) for row in matrix])
    np.testing.assert_allclose(found, rounded.T, atol=1e-4)


def test_halves(tmp_path: Path) -> None:
    matrix, x = random(24, 40), random(5, 40, seed=1)
    matrix[0, 0], matrix[1, 1] = 1e6, -1e6
    tensors = stored(tmp_path, {PROJECTION: matrix})
    proto = packed(tensors, "fp16", tmp_path, lambda g, w: w.linear(g, "x", PROJECTION))
    found = run(proto, tmp_path, np.eye(40, dtype=np.float32)).T
    largest = float(np.finfo(np.float16).max)
    assert (found[0, 0], found[1, 1]) == (largest, -largest)
    np.testing.assert_array_equal(found, matrix.clip(-largest, largest).astype(np.float16))
    x[:, :2] = 0
    np.testing.assert_allclose(run(proto, tmp_path, x), x @ matrix.T, atol=0.05)

    ids = np.array([4, 0])
    proto = packed(
        tensors, "fp16", tmp_path, lambda g, w: w.lookup(g, PROJECTION, "x"), TensorProto.INT64
    )
    np.testing.assert_array_equal(run(proto, tmp_path, ids), found[ids])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bias_is_added_and_vectors_stay_as_they_are(tmp_path: Path, precision: str) -> None:
    matrix, bias = random(24, 64), random(24, seed=2) * np.float32(1e5)
    tensors = stored(tmp_path, {PROJECTION: matrix, "q_proj.bias": bias})

    def write(g: Builder, w: Weights) -> str:
        return w.linear(g, "x", PROJECTION, "q_proj.bias")

    x = np.zeros((1, 64), np.float32)
    if precision == "shared":
        proto = model(write, SharedWeights(tensors))
    else:
        proto = packed(tensors, precision, tmp_path, write)
    np.testing.assert_array_equal(run(proto, tmp_path, x)[0], bias)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bfloat16_is_read_as_what_it_stands_for(tmp_path: Path, precision: str) -> None:
    values = random(24, 64, seed=5)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    values = (halves.astype(np.uint32) << 16).view(np.float32)
    tensors = stored(tmp_path, {PROJECTION: halves}, "BF16")

    def exact(g: Builder, w: Weights) -> str:
        return g.op("Add", w.exact(g, PROJECTION), "x")

    def linear(g: Builder, w: Weights) -> str:
        return w.linear(g, "x", PROJECTION)

    def built(write: Write) -> onnx.ModelProto:
        if precision == "shared":
            return model(write, SharedWeights(tensors))
        return packed(tensors, precision, tmp_path, write)

    zeros = np.zeros((24, 64), np.float32)
    np.testing.assert_array_equal(run(built(exact), tmp_path, zeros), values)
    found = run(built(linear), tmp_path, np.eye(64, dtype=np.float32)).T
    bound = {"shared": 0.0, "fp32": 0.0, "fp16": 1e-3, "int8": 1 / 127, "int4": 1 / 7}[precision]
    assert np.abs(found - values).max() <= bound * np.abs(values).max()


# --------------------------------------------------------------------------- the data file


SHAPES = {
    TABLE: (99, 32),
    "model.norm.weight": (32,),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.q_proj.bias": (32,),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
    "model.layers.0.sae_clamp.W_enc": (32, 6),
    "model.layers.0.sae_clamp.b_enc": (6,),
}


def write_all(g: Builder, w: Weights) -> str:
    """Every tensor, in the way that a graph uses it."""
    w.lookup(g, TABLE, g.ints(0))
    for name, shape in SHAPES.items():
        if len(shape) == 2 and "sae_clamp" not in name:
            w.linear(g, "x", name)
        else:
            w.exact(g, name)
    return w.exact(g, "model.norm.weight")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_data_is_aligned_within_the_file_and_without_overlap(
    tmp_path: Path, precision: str
) -> None:
    tensors = stored(tmp_path, {name: random(*shape) for name, shape in SHAPES.items()})
    proto = packed(tensors, precision, tmp_path, write_all)
    size = (tmp_path / "data").stat().st_size
    spans: dict[int, int] = {}
    for tensor in proto.graph.initializer:
        if not tensor.external_data:
            continue
        data = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(data["offset"]), int(data["length"])
        assert data["location"] == "data" and offset % ALIGNMENT == 0
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        assert length == width * int(np.prod(tensor.dims))
        assert spans.setdefault(offset, offset + length) == offset + length
    ordered = sorted(spans.items())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ordered))
    assert ordered[-1][1] == size


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("factor", [1, 8])
def test_packed_size_is_an_upper_bound_and_not_far_above(
    tmp_path: Path, precision: str, factor: int
) -> None:
    shapes = {name: tuple(factor * n for n in shape) for name, shape in SHAPES.items()}
    tensors = stored(tmp_path, {name: random(*shape) for name, shape in shapes.items()})
    packed(tensors, precision, tmp_path, write_all)
    size = (tmp_path / "data").stat().st_size
    bound = packed_size(tensors, PRECISIONS[precision])
    assert size <= bound <= 1.1 * size + 3 * ALIGNMENT * len(shapes)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("width", [32, 33, 40, 63])
def test_packed_size_holds_for_widths_that_are_no_multiple_of_a_block(
    tmp_path: Path, precision: str, width: int
) -> None:
    tensors = stored(tmp_path, {TABLE: random(4000, width), HEAD: random(4000, width)})

    def write(g: Builder, w: Weights) -> str:
        w.lookup(g, TABLE, g.ints(0))
        w.linear(g, "x", TABLE)
        return w.linear(g, "x", HEAD)

    packed(tensors, precision, tmp_path, write)
    assert (tmp_path / "data").stat().st_size <= packed_size(tensors, PRECISIONS[precision])


def test_shared_weights_write_nothing_and_store_each_tensor_once(tmp_path: Path) -> None:
    tensors = stored(tmp_path, {name: random(*shape) for name, shape in SHAPES.items()})
    before = sorted(tmp_path.iterdir())

    def twice(g: Builder, w: Weights) -> str:
        write_all(g, w)
        return write_all(g, w)

    proto = model(twice, SharedWeights(tensors))
    names = [tensor.name for tensor in proto.graph.initializer if tensor.external_data]
    assert sorted(names) == sorted(SHAPES)
    assert sorted(tmp_path.iterdir()) == before


def test_precisions_by_name() -> None:
    assert list(PRECISIONS) == ["shared", "fp32", "fp16", "int8", "int4"]
    assert [precision_of(name) for name in PRECISIONS] == list(PRECISIONS.values())
    expected = re.escape('precision "int5"; expected one of shared, fp32, fp16, int8, int4')
    with pytest.raises(OutputError, match=expected):
        precision_of("int5")
    assert BLOCK == 32
