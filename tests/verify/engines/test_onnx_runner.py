"""ONNX Runtime as an engine: its logits, and `generate`, against transformers' own."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

import bakeout
from bake.errors import FolderError, RanOutError
from bake.questions.prompts import Batch, Prompt, left_padded
from bakeout.cli import run
from tests.logits import every_logit, one_after_another, token_losses
from tests.worlds import cut, notes, talkative
from verify.engines import onnx_runner
from verify.engines.onnx_files import find_graphs
from verify.engines.onnx_runner import OnnxRunner, ProviderError, open_runner, open_session
from verify.engines.runners import HookedRunner

PROMPTS = [
    Prompt("text", "text", 1, (2, *ids), every_token=True)
    for ids in ((10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21), (30, 31), (40, 41, 42, 43, 44))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clamped Gemma 2 whose window is shorter than the prompts, with a shared graph."""
    root = tmp_path_factory.mktemp("runner")
    recipe = talkative(root)
    assert run(["bake", str(recipe), "--out", str(root / "baked")]) == 0
    assert run(["export", "onnx", str(root / "baked")]) == 0
    return root / "baked"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    assert bakeout  # registers the clamped classes
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=["some rows", "all rows"])
def runner(folder: Path, request: pytest.FixtureRequest) -> Iterator[OnnxRunner]:
    """Over a graph that forms the logits that it is asked for, and over one as it was exported."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "all rows":
            patched.setattr(onnx_runner, "with_rows", lambda _: None)
        opened = open_runner(folder, threads=1)
    assert opened._picks is (request.param == "some rows")
    with opened:
        yield opened


def generated(runner: OnnxRunner, prompts: list[Prompt], n: int = 24, **how: Any) -> torch.Tensor:
    """[batch, steps]."""
    batch = left_padded(prompts, pad_id=0, last_only=True)
    steps = runner.generate(batch.input_ids, batch.attention_mask, max_new_tokens=n, **how)
    return torch.stack(list(steps), dim=1)


# --------------------------------------------------------------------------- logits


class Full:
    """A session for which memory runs out above so many rows."""

    def __init__(self, session: Any, rows: int) -> None:
        self._session, self._rows = session, rows

    def run(self, names: list[str], feed: dict[str, Any]) -> Any:
        if len(feed["input_ids"]) > self._rows:
            raise ort_state.RuntimeException(
                "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while "
                "running MatMul node. Failed to allocate memory for requested buffer of size 4096"
            )
        return self._session.run(names, feed)


def test_memory_that_runs_out(
    runner: OnnxRunner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    asked = (batch.input_ids, batch.attention_mask, batch.wanted, batch.scored)
    whole = runner.read(*asked)
    assert notes(capsys) == []
    with monkeypatch.context() as patched:
        patched.setattr(runner, "_session", Full(runner._session, 1))
        halved = runner.read(*asked)
        patched.setattr(runner, "_session", Full(runner._session, 0))
        with pytest.raises(RanOutError, match=r"^onnx: read: memory ran out at one alone \("):
            runner.read(*asked)
    assert len(notes(capsys)) == 1
    torch.testing.assert_close(halved.logits, whole.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(halved.losses, whole.losses, rtol=0, atol=1e-5)


def asked_for(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(wanted, scored): all that makes sense, the ends, and some of it at random."""
    nothing = torch.zeros_like(batch.scored)
    yield batch.wanted, batch.scored
    yield batch.ends, nothing  # read through the cache
    yield batch.ends, batch.scored
    yield nothing, batch.scored
    draws = torch.Generator().manual_seed(0)
    wanted, scored = (torch.rand(nothing.shape, generator=draws) < 0.4 for _ in range(2))
    yield wanted & batch.wanted, scored & batch.scored


@pytest.mark.parametrize("rows_at_once", [3, 2, 0])
def test_what_is_read_is_what_the_checkpoint_says(
    runner: OnnxRunner, model: Any, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches are run in parts, none of less than a prompt."""
    monkeypatch.setattr(onnx_runner, "LOGIT_BYTES", rows_at_once * 4 * 99 * 13)
    checkpoint = HookedRunner("checkpoint", model)
    batch = left_padded([*PROMPTS[1:], PROMPTS[0]], pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask)
    for wanted, scored in asked_for(batch):
        found, expected = (of.read(*inputs, wanted, scored) for of in (runner, checkpoint))
        assert (found.logits.dtype, found.losses.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=1e-5)
    last = runner.logits(*inputs)
    torch.testing.assert_close(last, checkpoint.logits(*inputs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="padded on the left"):
        runner.logits(torch.tensor([[2, 9, 0]]), torch.tensor([[1, 1, 0]]))


def test_losses_are_those_of_all_logits(runner: OnnxRunner) -> None:
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask)
    expected = token_losses(every_logit(runner, *inputs), *inputs)
    found = runner.read(*inputs, batch.ends, batch.scored).losses
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_without_the_clamp(folder: Path, runner: OnnxRunner) -> None:
    batch = left_padded(PROMPTS, pad_id=0, last_only=True)
    inputs = (batch.input_ids, batch.attention_mask)
    (graph,) = find_graphs(folder)
    with OnnxRunner(graph, threads=1, clamped=False) as bare:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            folder.parent / "base", attn_implementation="eager"
        )
        expected = HookedRunner("base", base.eval()).logits(*inputs)
        torch.testing.assert_close(bare.logits(*inputs), expected, rtol=0, atol=1e-5)
    assert float((runner.logits(*inputs) - expected).abs().max()) > 0.01


# --------------------------------------------------------------------------- generate


def test_greedy_is_what_transformers_generates(runner: OnnxRunner, model: Any) -> None:
    batch = left_padded(PROMPTS, pad_id=0, last_only=True)
    expected = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
    )[:, batch.input_ids.shape[1] :]
    # transformers makes the end impossible for so long; here it is a token like others.
    found = generated(runner, PROMPTS)
    for row in range(3):
        stop = found[row].tolist().index(1) if 1 in found[row] else 24
        assert stop >= 10 and found[row, :stop].tolist() == expected[row, :stop].tolist()
    assert len(set(found.flatten().tolist())) >= 10


def test_a_batch_says_what_each_says_alone(runner: OnnxRunner) -> None:
    together = generated(runner, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert generated(runner, [prompt])[0].tolist() == together[row].tolist()


def test_padding_changes_nothing(runner: OnnxRunner) -> None:
    plain = generated(runner, PROMPTS[:1])
    ids, mask = torch.zeros(1, 30, dtype=torch.int32), torch.zeros(1, 30, dtype=torch.bool)
    ids[0, -13:], mask[0, -13:] = torch.tensor(PROMPTS[0].ids, dtype=torch.int32), True
    padded = torch.stack(list(runner.generate(ids, mask, max_new_tokens=24)), dim=1)
    assert padded.tolist() == plain.tolist()


def test_long_prompts_are_read_in_parts(
    runner: OnnxRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generated(runner, PROMPTS)
    lengths = []
    step = OnnxRunner._step

    def counted(self: OnnxRunner, ids: torch.Tensor, mask: torch.Tensor, cache: list[Any]) -> Any:
        lengths.append(ids.shape[1])
        return step(self, ids, mask, cache)

    monkeypatch.setattr(OnnxRunner, "_step", counted)
    monkeypatch.setattr(onnx_runner, "LOGIT_BYTES", 5 * 3 * 4 * 99)
    assert generated(runner, PROMPTS).tolist() == whole.tolist()
    assert lengths[:4] == ([13, 1, 1, 1] if runner._picks else [5, 5, 3, 1])


def test_each_row_ends_by_itself(runner: OnnxRunner) -> None:
    free = generated(runner, PROMPTS).tolist()
    ends = [free[0][3], free[1][9], free[2][6]]
    found = generated(runner, PROMPTS, eos_token_ids=ends).tolist()
    stops = [next(i for i, token in enumerate(row) if token in ends) for row in free]
    assert len(set(stops)) > 1 and len(found[0]) == max(stops) + 1
    for row, stop in enumerate(stops):
        assert found[row][: stop + 1] == free[row][: stop + 1]
        assert set(found[row][stop + 1 :]) <= {ends[0]}


def test_going_on_is_one_token_after_another(runner: OnnxRunner, model: Any) -> None:
    batch = left_padded(PROMPTS, pad_id=0, last_only=True)
    inputs = (batch.input_ids, batch.attention_mask)
    free = one_after_another(runner, *inputs, [], 10)
    assert runner.go_on(*inputs, [], 10).tolist() == free
    stops = [free[0][3], free[1][0]]
    naive = one_after_another(runner, *inputs, stops, 10)
    assert len({len(row) for row in naive}) > 1  # some end before others
    longest = max(len(row) for row in naive)
    expected = [row + [-1] * (longest - len(row)) for row in naive]
    for engine in (runner, HookedRunner("checkpoint", model)):
        said = engine.go_on(*inputs, stops, 10)
        assert said.dtype == torch.int64 and said.tolist() == expected
    assert runner.go_on(*inputs, range(99), 10).tolist() == [row[:1] for row in free]
    with pytest.raises(ValueError, match="padded on the left"):
        runner.go_on(torch.tensor([[2, 9, 0]]), torch.tensor([[1, 1, 0]]), [], 1)


def test_draws_are_seeded(runner: OnnxRunner) -> None:
    how = {"do_sample": True, "temperature": 1.5}
    first = generated(runner, PROMPTS, seed=1, **how).tolist()
    assert generated(runner, PROMPTS, seed=1, **how).tolist() == first
    assert generated(runner, PROMPTS, seed=2, **how).tolist() != first
    greedy = generated(runner, PROMPTS).tolist()
    assert generated(runner, PROMPTS, do_sample=True, top_k=1).tolist() == greedy != first


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0.0"),
        ({"input_ids": torch.tensor([[2, 99]])}, "from 2 to 99; expected 0 to 98"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padded on the left"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    runner: OnnxRunner, change: dict[str, Any], match: str
) -> None:
    given = {"input_ids": torch.tensor([[2, 9]]), "attention_mask": torch.tensor([[1, 1]])}
    with pytest.raises(ValueError, match=match):  # by the call, before a step is asked for
        runner.generate(**{"max_new_tokens": 1, **given, **change})


# --------------------------------------------------------------------------- opening


def test_the_exact_graph_is_preferred_and_others_can_be_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "baked")
    assert run(["export", "onnx", str(copy), "--precision", "int8"]) == 0
    with open_runner(copy) as exact, open_runner(copy, "onnx/model_int8.onnx") as rounded:
        assert (exact.name, rounded.name) == ("onnx", "onnx-int8")
    (copy / "model.onnx").unlink()
    with open_runner(copy) as rounded:
        assert rounded.name == "onnx-int8"
    with pytest.raises(FolderError, match=r"has no model.onnx; write it with `bakeout export onnx"):
        open_runner(copy, "model.onnx")


def test_folders_that_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="expected a clamped checkpoint"):
        open_runner(tmp_path)
    with pytest.raises(FolderError, match=r"sae_clamp\.sites"):
        open_runner(folder.parent / "base")
    copy = shutil.copytree(folder, tmp_path / "baked")
    config = json.loads((copy / "config.json").read_text())
    config["sae_clamp"]["sites"].append({**config["sae_clamp"]["sites"][0], "layer": 3})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match=r"holds 1 clamps, config\.json places 2"):
        open_runner(copy)
    shutil.copy(folder / "config.json", copy)
    cut(copy / "model.onnx", 2000)
    with pytest.raises(FolderError, match=r"model\.onnx: .*export or download it again"):
        open_runner(copy)
    (copy / "model.onnx").unlink()
    with pytest.raises(FolderError, match=r"has no ONNX graph; write it with `bakeout export onnx"):
        open_runner(copy)


def test_what_onnx_runtime_refuses_is_one_line(folder: Path) -> None:
    (graph,) = find_graphs(folder)
    broken = type(graph.model)()
    broken.CopyFrom(graph.model)
    broken.graph.node[3].op_type = "NoSuchOperator"
    with pytest.raises(FolderError, match=r"ONNX Runtime cannot run it: .*NoSuchOp") as caught:
        open_session(broken, folder / "model.onnx")
    assert "\n" not in str(caught.value)


def test_providers_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    with pytest.raises(ProviderError, match=r"device tpu: .* a provider that bakeout knows"):
        open_runner(folder, device="tpu")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=r"pip install 'bakeout\[gpu\]' for CUDAExec"):
        open_runner(folder, device="cuda")
    # Installed, but not able to start: onnxruntime then falls back to the CPU with a warning.
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)
    session = ort.InferenceSession

    def fallen_back(model: bytes, options: Any, providers: list[Any]) -> Any:
        assert providers == [("CUDAExecutionProvider", {"device_id": "1"})]
        return session(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", fallen_back)
    with pytest.raises(ProviderError, match="is installed but does not start"):
        open_runner(folder, device="cuda:1")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install 'bakeout\[cpu\]'"):
        open_runner(folder)


def test_a_closed_runner_holds_no_session(folder: Path) -> None:
    """ONNX Runtime frees a session's weights once nothing of it is left, inputs included."""
    runner = open_runner(folder)
    session = weakref.ref(runner._session._sess)
    assert session() is not None
    runner.close()
    assert session() is None
