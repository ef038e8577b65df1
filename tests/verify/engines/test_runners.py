from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.errors import FolderError, RanOutError, TooLargeError
from bake.questions.prompts import Batch, Prompt, left_padded
from bake.recipe import Recipe
from bake.stock import load_base
from tests.logits import every_logit, token_losses
from tests.worlds import KINDS, notes, save_sae_lens, tiny_base, tiny_sae
from verify.engines import torch_worker
from verify.engines.runners import HookedRunner, TorchRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

PROMPTS = [
    Prompt("text", "text", 1, (2, *ids), every_token=True)
    for ids in ((10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21), (30, 31), (40, 41, 42, 43, 44))
]


ASKED = Prompt("forget", "chat", 1, (2, *range(60, 77)), every_token=True)
"""No text: the loss of what follows its tokens is not taken."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in KINDS}


def recipe_over(base: Path, folder: Path, write_recipe: Callable[..., Path]) -> Recipe:
    """Two layers are clamped."""
    tables = []
    for layer, features in ((1, [0, 1]), (2, [2])):
        save_sae_lens(folder / f"sae{layer}", tiny_sae(layer), layer=layer)
        table = {"method": "clamp", "features": features, "value": -5.0}
        tables.append(table | {"sae": {"path": f"sae{layer}"}})
    return Recipe.load(write_recipe(*tables, base={"model": str(base)}))


@pytest.fixture
def oracle(
    request: pytest.FixtureRequest,
    bases: dict[str, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> Oracle:
    recipe = recipe_over(bases[request.param], tmp_path, write_recipe)
    return Oracle(load_base(recipe), load_sites(recipe))


def runners(oracle: Oracle) -> list[HookedRunner]:
    return [
        HookedRunner("base", oracle.model),
        HookedRunner("reference", oracle.model, oracle),
    ]


@pytest.mark.parametrize("oracle", KINDS, indirect=True)
def test_left_padded_equals_alone(oracle: Oracle) -> None:
    for runner in runners(oracle):
        batch = left_padded(PROMPTS, pad_id=0, last_only=False)
        together = every_logit(runner, batch.input_ids, batch.attention_mask)
        last = runner.logits(batch.input_ids, batch.attention_mask)
        assert together.dtype == torch.float32
        assert last.shape == (3, together.shape[-1])
        torch.testing.assert_close(last, together[:, -1], rtol=0, atol=1e-5)
        for row, prompt in enumerate(PROMPTS):
            alone = left_padded([prompt], pad_id=0, last_only=False)
            expected = every_logit(runner, alone.input_ids, alone.attention_mask)
            found = together[row, -len(prompt.ids) :]
            torch.testing.assert_close(found, expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("oracle", ["gemma2"], indirect=True)
def test_one_model_is_base_and_reference(oracle: Oracle) -> None:
    base, reference = runners(oracle)
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask, batch.wanted)
    before = base.logits(*inputs)
    assert oracle.tokens_fired == 0
    edited = reference.logits(*inputs)
    assert 0 < oracle.tokens_fired < int(batch.attention_mask.sum())
    assert not torch.equal(edited, before)
    assert torch.equal(base.logits(*inputs), before)


@pytest.mark.parametrize("oracle", ["gemma2"], indirect=True)
def test_right_padding_is_refused_where_the_last_column_counts(oracle: Oracle) -> None:
    ids, mask = torch.tensor([[2, 9, 0]]), torch.tensor([[1, 1, 0]])
    for runner in runners(oracle):
        with pytest.raises(ValueError, match="padded on the left"):
            runner.logits(ids, mask)
        with pytest.raises(ValueError, match="padded on the left"):
            runner.go_on(ids, mask, [], 1)


# --------------------------------------------------------------------------- what is read


def asked_for(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(wanted, scored): what a comparison asks for, and some of it at random."""
    nothing = torch.zeros_like(batch.scored)
    yield batch.wanted, batch.scored
    yield batch.ends, batch.scored
    yield nothing, batch.scored
    yield batch.wanted, nothing
    yield nothing, nothing
    draws = torch.Generator().manual_seed(0)
    for _ in range(3):
        wanted, scored = (torch.rand(nothing.shape, generator=draws) < 0.4 for _ in range(2))
        yield wanted & batch.wanted, scored & batch.scored


@pytest.mark.parametrize("oracle", KINDS, indirect=True)
def test_what_is_read_is_what_all_logits_say_and_no_others_are_formed(oracle: Oracle) -> None:
    batch = left_padded([*PROMPTS, ASKED], pad_id=0, last_only=False)
    ids, mask = batch.input_ids, batch.attention_mask
    formed: list[int] = []
    head = oracle.model.get_output_embeddings()
    head.register_forward_hook(lambda _, given, __: formed.append(given[0][..., 0].numel()))
    for runner in runners(oracle):
        whole = every_logit(runner, ids, mask)
        assert formed.pop() == mask.numel()
        for wanted, scored in asked_for(batch):
            found = runner.read(ids, mask, wanted, scored)
            assert formed.pop() == int((wanted | scored).sum()) and not formed
            assert (found.logits.dtype, found.losses.dtype) == (torch.float32, torch.float64)
            torch.testing.assert_close(found.logits, whole[wanted], rtol=0, atol=1e-5)
            expected = [
                float(-whole[row, at].double().log_softmax(-1)[ids[row, at + 1]])
                for row, at in scored.nonzero().tolist()
            ]
            assert found.losses.tolist() == pytest.approx(expected, abs=1e-5)
    text = token_losses(whole[:3], ids[:3], mask[:3])
    seen = runner.read(ids, mask, batch.ends, batch.scored).losses
    torch.testing.assert_close(seen, text, rtol=0, atol=1e-5)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("oracle", KINDS, indirect=True)
def test_a_reference_chooses_by_where_its_clamps_fired(oracle: Oracle) -> None:
    batch = left_padded([*PROMPTS, ASKED], pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask)
    _, reference = runners(oracle)
    whole = every_logit(reference, *inputs)
    assert oracle.last_fired is not None and min(oracle.fired_by_layer.values()) > 0
    expected = oracle.last_fired
    assert 0 < int(expected.sum()) < int(batch.attention_mask.sum())
    below = Oracle(oracle.model, oracle.sites[:1])  # what is clamped above does not move it
    every_logit(HookedRunner("below", oracle.model, below), *inputs)
    assert below.last_fired is not None
    assert not (below.last_fired & ~expected).any()
    assert int(expected.sum()) > max(oracle.fired_by_layer.values())  # those of both layers
    reference.logits(torch.tensor([[2, 9]]), torch.tensor([[1, 1]]))  # what fired there is no news

    def fired(_: slice) -> torch.Tensor:
        assert oracle.last_fired is not None
        return oracle.last_fired.clone()

    before = oracle.tokens_fired
    found = reference.read(*inputs, fired, batch.scored)
    assert oracle.tokens_fired == before + int(expected.sum())
    torch.testing.assert_close(found.logits, whole[expected], rtol=0, atol=1e-5)
    losses = reference.read(*inputs, batch.ends, batch.scored).losses
    torch.testing.assert_close(found.losses, losses, rtol=0, atol=1e-5)
    assert torch.equal(oracle.last_fired, expected)

    def refused(_: slice) -> torch.Tensor:
        raise KeyError("no choice")

    with pytest.raises(KeyError, match="no choice"):
        reference.read(*inputs, refused, batch.scored)
    assert not oracle.model.get_output_embeddings()._forward_pre_hooks
    again = reference.logits(*inputs, expected)
    torch.testing.assert_close(again, whole[expected], rtol=0, atol=1e-5)


def test_in_16_bits_losses_are_those_of_the_logits(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = recipe_over(bases["gemma2"], tmp_path, write_recipe)
    runner = HookedRunner("base", load_base(recipe, dtype="bfloat16"))
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    found = runner.read(batch.input_ids, batch.attention_mask, batch.wanted, batch.scored)
    whole = torch.zeros(*batch.input_ids.shape, found.logits.shape[-1])
    whole[batch.wanted] = found.logits
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits, found.logits.bfloat16().float())
    expected = token_losses(whole, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(found.losses, expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------- in its own process


@pytest.fixture
def worker(bases: dict[str, Path]) -> Iterator[TorchRunner]:
    with TorchRunner(bases["gemma2"]) as runner:
        yield runner


@pytest.mark.parametrize("oracle", ["gemma2"], indirect=True)
def test_the_same_model_gives_the_same_logits_in_another_process(
    oracle: Oracle, worker: TorchRunner
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert worker.load("float32") == "Gemma2ForCausalLM"
    base = HookedRunner("base", oracle.model)
    for last_only in (False, True):
        batch = left_padded([*PROMPTS, ASKED], pad_id=0, last_only=last_only)
        inputs = (batch.input_ids, batch.attention_mask, batch.wanted, batch.scored)
        found, expected = worker.read(*inputs), base.read(*inputs)
        assert (found.logits.dtype, found.losses.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=2e-6)
        assert len(found.losses) == sum(len(prompt.ids) - 1 for prompt in PROMPTS)
    torch.set_num_threads(before)
    # A request that cannot be answered is one line, and the next one is answered again.
    with pytest.raises(FolderError, match="IndexError") as caught:
        worker.logits(torch.tensor([[2, 5000]]), torch.tensor([[1, 1]]))
    assert "\n" not in str(caught.value) and not isinstance(caught.value, RanOutError)
    assert worker.logits(*inputs[:2]).shape[0] == 4
    # So is its end.
    worker._process.kill()
    ended = r"gemma2: the process that loaded it ended .* -9 .* memory ran out, it seems"
    with pytest.raises(RanOutError, match=ended):
        worker.read(*inputs)


CLAMPED = """
import os
from transformers import Gemma2Config, Gemma2ForCausalLM
print("printing is no answer")
os.write(1, b"neither is this")
{code}
class ClampedGemma2ForCausalLM(Gemma2ForCausalLM):
    pass
"""


ALONE = "assert 'HF_TOKEN' not in os.environ and os.environ['HOME'] == os.getcwd()"


def clamped_folder(folder: Path, base: Path, code: str) -> Path:
    """A folder of ours, with code of its own."""
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "clamped_gemma2"
    config["auto_map"] = {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("custom.py", "modeling_clamped_gemma.py"):
        (folder / name).write_text(code)
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    return folder


def test_bakeouts_own_file_runs_whatever_the_folder_holds_and_without_bakeout(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = f"open({str(tmp_path / 'marker')!r}, 'w')"
    folder = clamped_folder(tmp_path / "folder", bases["gemma2"], CLAMPED.format(code=planted))
    with TorchRunner(folder) as runner, pytest.raises(FolderError, match=r"config\.sae_clamp"):
        runner.load("float32")  # what bakeout's own says of a base without a clamp
    plain, needy = tmp_path / "plain.py", tmp_path / "needy.py"
    plain.write_text(CLAMPED.format(code=ALONE))
    monkeypatch.setenv("HF_TOKEN", "secret")
    needy.write_text(CLAMPED.format(code="def late():\n    pass\nfrom bake import recipe"))
    monkeypatch.setattr("verify.engines.runners.MODELING", plain)
    with TorchRunner(folder) as runner:
        assert runner.load("float32") == "ClampedGemma2ForCausalLM"
    monkeypatch.setattr("verify.engines.runners.MODELING", needy)
    with TorchRunner(folder) as runner:
        with pytest.raises(FolderError, match=r"folder: .*it tried to import bake") as caught:
            runner.load("float32")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_a_request_that_takes_too_long_is_one_line(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.strangers.confined.SECONDS", 0.01)
    with TorchRunner(bases["gemma2"]) as runner:
        with pytest.raises(RanOutError, match="gemma2: load took over 0 seconds, and was stopped"):
            runner.load("float32")
        assert runner._process.wait() == -9


def test_a_request_that_takes_too_much_memory_is_told_from_a_refusal(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    answer = torch_worker.pack({"error": f"RuntimeError: {' '.join(str(caught.value).split())}"})
    monkeypatch.setattr(torch_worker, "read_message", lambda _: answer)
    with (
        TorchRunner(bases["gemma2"]) as runner,
        pytest.raises(RanOutError, match=r"gemma2: RuntimeError: .*; take a device with more"),
    ):
        runner.load("float32")


def test_a_worker_is_given_half_where_memory_runs_out(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask, limit, asked = TorchRunner._ask, 9, []

    def full(self: TorchRunner, words: dict[str, str], **tensors: torch.Tensor) -> Any:
        rows = len(tensors.get("input_ids", ()))
        asked.append(rows)
        if rows > limit:
            raise TooLargeError("gemma2: OutOfMemoryError: CUDA out of memory")
        return ask(self, words, **tensors)

    monkeypatch.setattr(TorchRunner, "_ask", full)
    batch = left_padded([*PROMPTS, ASKED], pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask)

    def found(runner: TorchRunner) -> list[torch.Tensor]:
        read = runner.read(*inputs, batch.wanted, batch.scored)
        decoded = runner.decoded(*inputs, 3)
        return [read.logits, read.losses, decoded, runner.go_on(*inputs, [70], 4)]

    with TorchRunner(bases["gemma2"]) as runner:
        runner.load("float32")
        whole = found(runner)
        limit = 1
        halved = found(runner)
        assert sorted(set(asked)) == [0, 1, 2, len(batch.prompts)]
        limit = 0
        with pytest.raises(RanOutError, match=r"^gemma2: OutOfMemoryError: CUDA out of memory$"):
            found(runner)
    for one, other in zip(whole, halved, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert [line.split(":")[2] for line in notes(capsys)] == [
        *(" read", " read", " decoded", " decoded", " go on", " go on"),
    ]


def test_a_damaged_folder_is_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_bytes((bases["gemma2"] / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with TorchRunner(folder) as runner, pytest.raises(FolderError) as caught:
        runner.load("float32")
    assert str(caught.value).startswith("damaged: transformers alone cannot run it: Safetensor")
    assert "\n" not in str(caught.value)
    assert runner._process.returncode is not None
    assert not runner._scratch.path.exists()
