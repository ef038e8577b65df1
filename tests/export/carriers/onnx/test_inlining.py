"""Graphs without ONNX functions: the same logits, and verified like the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from bake.recipe import Recipe
from export.carriers.onnx.inlining import INLINED
from export.carriers.onnx.onnx_folder import export_onnx
from tests.folders import baked_world, rehash
from tests.logits import tiny_prompts
from verify.run import verify_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and `plain` and `inlined` checkpoints with a graph each."""
    folder = baked_world(tmp_path_factory.mktemp("inline"), [1, 5, 9])
    shutil.copytree(folder / "checkpoint", folder / "inlined")
    export_onnx(folder / "checkpoint")
    export_onnx(folder / "inlined", inline=True)
    return folder


def logits(graph: Path) -> np.ndarray:
    """In ONNX Runtime, [batch, seq, vocab]."""
    import onnxruntime as ort

    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feed = inputs(session)
    return np.asarray(session.run(["logits"], feed)[0])


def inputs(session: object) -> dict[str, np.ndarray]:
    ids = tiny_prompts().numpy()
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places.copy()}
    for value in session.get_inputs():  # type: ignore[attr-defined]
        if value.name.startswith("past_key_values."):
            heads, width = value.shape[1], value.shape[3]
            feed[value.name] = np.zeros((len(ids), heads, 0, width), np.float32)
    return feed


def test_no_function_is_left_and_the_logits_are_the_same(world: Path) -> None:
    model = onnx.load(world / "inlined" / "model.onnx", load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    assert {entry.domain for entry in model.opset_import} <= {"", "com.microsoft"}
    plain, flat = (logits(world / name / "model.onnx") for name in ("checkpoint", "inlined"))
    assert np.abs(plain - flat).max() <= 1e-5


def test_it_verifies(world: Path) -> None:
    recipe = Recipe.load(world / "recipe.toml")
    report = verify_folder(world / "inlined", recipe, frozenset({"integrity", "parity"}))
    assert report.verdict == "pass", report.failures


def test_one_that_only_says_so_does_not(world: Path, tmp_path: Path) -> None:
    """The clamps taken out, and the metadata of an inlined graph put in."""
    folder = tmp_path / "bare"
    shutil.copytree(world / "checkpoint", folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SAEClamp":
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    del model.functions[:]
    stated = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, stated | {INLINED: "true"})
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rehash(folder)
    recipe = Recipe.load(world / "recipe.toml")
    report = verify_folder(folder, recipe, frozenset({"integrity"}))
    assert any("model.onnx: lacks node" in f.what or "has node" in f.what for f in report.failures)


def test_openvino_runs_it(world: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled = core.compile_model(str(world / "inlined" / "model.onnx"), "CPU")

    class Session:
        def get_inputs(self) -> list[object]:
            from types import SimpleNamespace

            config = json.loads((world / "inlined" / "config.json").read_text())
            shape = [0, config["num_key_value_heads"], 0, config["head_dim"]]
            return [
                SimpleNamespace(name=one.get_any_name(), shape=shape) for one in compiled.inputs
            ]

    found = compiled(inputs(Session()))[compiled.output("logits")]
    assert np.abs(found - logits(world / "checkpoint" / "model.onnx")).max() <= 1e-3
