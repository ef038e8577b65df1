"""Graphs that form some tokens' logits: the same as the whole graph forms, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from bake.questions.prompts import Prompt, left_padded
from bakeout.verbs.baking import bake_recipe
from export.carriers.onnx.onnx_folder import export_onnx
from export.carriers.onnx.precisions import PRECISIONS
from tests.folders import STOCK_TEXT_CLASSES, write_verify_recipe
from tests.worlds import VOCAB, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.engines import onnx_runner
from verify.engines.onnx_files import Graph, find_graphs
from verify.engines.onnx_head import ROWS, with_rows
from verify.engines.onnx_runner import OnnxRunner, open_session

PROMPTS = [Prompt("text", "text", 1, (2, *range(10, 10 + n)), every_token=True) for n in (3, 14, 9)]


@pytest.fixture(scope="module", params=STOCK_TEXT_CLASSES)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Graph]:
    """A clamped folder's graphs in every precision."""
    folder = tmp_path_factory.mktemp("graphs")
    tiny_tokenizer(tiny_base(folder / "base", request.param))
    save_sae_lens(folder / "sae", tiny_sae())
    clamp = {"sae": {"path": "sae"}, "method": "clamp", "features": [1, 5, 9], "value": -6.0}
    bake_recipe(write_verify_recipe(folder / "recipe.toml", clamp), folder / "out", force=False)
    for precision in PRECISIONS:
        export_onnx(folder / "out", precision=precision)
    return find_graphs(folder / "out")


def inputs_of(runner: OnnxRunner) -> dict[str, Any]:
    """The three prompts as a batch, with nothing cached."""
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    mask = batch.attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    feed = {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.numpy() for name, tensor in feed.items()} | runner._no_past(3)


def test_rows_are_those_of_the_whole_graph(graphs: list[Graph]) -> None:
    assert [graph.name for graph in graphs] == [of.engine for of in PRECISIONS.values()]
    rows = np.array([44, 0, 17, 30, 30], dtype=np.int64)  # in any order, of 3 · 15
    for graph in graphs:
        before = graph.model.SerializeToString()
        with OnnxRunner(graph, threads=1) as runner:
            assert runner._picks
            feed = inputs_of(runner)
            whole = open_session(graph.model, graph.path, threads=1).run(["logits"], feed)[0]
            (found,) = runner._session.run(["logits"], feed | {ROWS: rows})
            (nothing,) = runner._session.run(["logits"], feed | {ROWS: rows[:0]})
        assert whole.shape == (3, 15, VOCAB) and found.shape == (5, VOCAB)
        apart = 5e-3 if graph.name == "onnx-fp16" else 1e-5  # a few roundings of what is summed
        np.testing.assert_allclose(found, whole.reshape(-1, VOCAB)[rows], rtol=0, atol=apart)
        assert nothing.shape == (0, VOCAB)
        assert graph.model.SerializeToString() == before  # it is a copy that is changed


def test_no_other_rows_pass_the_matrix(graphs: list[Graph]) -> None:
    for graph in graphs:
        found = with_rows(graph.model)
        assert found is not None
        (matrix,) = (node for node in found.graph.node if f"{ROWS}/taken" in node.input)
        made = onnx.ModelProto()
        made.CopyFrom(found)
        kind = onnx.TensorProto.FLOAT16 if graph.name == "onnx-fp16" else onnx.TensorProto.FLOAT
        made.graph.output.append(helper.make_tensor_value_info(matrix.output[0], kind, None))
        with OnnxRunner(graph, threads=1) as runner:
            feed = inputs_of(runner) | {ROWS: np.array([3, 40], dtype=np.int64)}
            session = open_session(made, graph.path, threads=1)
            (formed,) = session.run([matrix.output[0]], feed)
        assert formed.shape == (2, VOCAB)
        assert len(found.graph.node) == len(graph.model.graph.node) + 1


def test_a_graph_that_ends_otherwise_is_run_as_it_is(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands behind the matrix is looked at; a graph of which it is not known is not cut."""
    exact = graphs[0]
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    asked = (batch.input_ids, batch.attention_mask, batch.wanted, batch.scored)
    with OnnxRunner(exact, threads=1) as runner:
        expected = runner.read(*asked)
    for negated in (_before_the_shape, _behind_the_shape):
        model = onnx.ModelProto()
        model.CopyFrom(exact.model)
        negated(model)
        assert with_rows(model) is None
        with OnnxRunner(Graph(exact.name, exact.path, model), threads=1) as runner:
            assert not runner._picks
            found = runner.read(*asked)
        torch.testing.assert_close(found.logits, -expected.logits, rtol=0, atol=1e-5)
    # And the engine is the same where it does not cut.
    monkeypatch.setattr(onnx_runner, "with_rows", lambda _: None)
    with OnnxRunner(exact, threads=1) as runner:
        found = runner.read(*asked)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["turned", "flat", "capped by tokens"])
def test_what_would_be_taken_out_is_looked_at_first(graphs: list[Graph], kind: str) -> None:
    """A graph that does harm behind the matrix is never read as one that does not."""
    model = onnx.ModelProto()
    model.CopyFrom(graphs[0].model)
    last = next(node for node in model.graph.node if "logits" in node.output)
    at = list(model.graph.node).index(last)
    if kind == "turned":  # [seq, batch, vocab]
        order = onnx.numpy_helper.from_array(np.array([1, 0, 2]), "order")
        model.graph.initializer.append(order)
        model.graph.node.insert(at, helper.make_node("Gather", [last.input[1], "order"], ["new"]))
        model.graph.node[at + 1].input[1] = "new"
    elif kind == "flat":  # a shape that the graph brings with it
        shape = onnx.numpy_helper.from_array(np.array([1, -1, VOCAB]), "shape")
        model.graph.initializer.append(shape)
        last.input[1] = "shape"
    else:
        model.graph.node.insert(at, helper.make_node("Cast", ["input_ids"], ["f"], to=1))
        model.graph.node.insert(at + 1, helper.make_node("Mul", [last.input[0], "f"], ["new"]))
        model.graph.node[at + 2].input[0] = "new"
    assert with_rows(model) is None


def _before_the_shape(model: onnx.ModelProto) -> None:
    last = next(node for node in model.graph.node if "logits" in node.output)
    at = list(model.graph.node).index(last)
    model.graph.node.insert(at, helper.make_node("Neg", [last.input[0]], ["negative"]))
    model.graph.node[at + 1].input[0] = "negative"


def _behind_the_shape(model: onnx.ModelProto) -> None:
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "shaped"
    model.graph.node.append(helper.make_node("Neg", ["shaped"], ["logits"]))


def test_of_another_graph_nothing_is_made(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "none",
        [value("x", onnx.TensorProto.FLOAT, ["n"])],
        [value("y", onnx.TensorProto.FLOAT, ["n"])],
    )
    assert with_rows(helper.make_model(graph)) is None
