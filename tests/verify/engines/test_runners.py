from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bake.errors import FolderError
from bake.questions.prompts import Prompt, left_padded
from bake.recipe import Recipe
from bake.stock import load_base
from tests.worlds import FAMILIES, save_sae_lens, tiny_base, tiny_sae
from verify.engines.runners import HookedRunner, Runner, TorchRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

PROMPTS = [
    Prompt("text", "text", 1, (2, *ids), every_token=True)
    for ids in ((10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21), (30, 31), (40, 41, 42, 43, 44))
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in FAMILIES}


@pytest.fixture
def oracle(
    request: pytest.FixtureRequest,
    bases: dict[str, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> Oracle:
    save_sae_lens(tmp_path / "sae", tiny_sae())
    table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1, 2, 3], "value": -5.0}
    recipe = Recipe.load(write_recipe(table, base={"model": str(bases[request.param])}))
    return Oracle(load_base(recipe), load_sites(recipe))


def runners(oracle: Oracle) -> list[Runner]:
    return [
        HookedRunner("base", oracle.model),
        HookedRunner("reference", oracle.model, oracle),
    ]


@pytest.mark.parametrize("oracle", FAMILIES, indirect=True)
def test_left_padded_equals_alone(oracle: Oracle) -> None:
    for runner in runners(oracle):
        batch = left_padded(PROMPTS, pad_id=0, last_only=False)
        together = runner.logits(batch.input_ids, batch.attention_mask, False)
        last = runner.logits(batch.input_ids, batch.attention_mask, True)
        assert together.dtype == torch.float32
        assert last.shape == (3, 1, together.shape[-1])
        torch.testing.assert_close(last[:, 0], together[:, -1], rtol=0, atol=1e-5)
        for row, prompt in enumerate(PROMPTS):
            alone = left_padded([prompt], pad_id=0, last_only=False)
            expected = runner.logits(alone.input_ids, alone.attention_mask, False)
            found = together[row, -len(prompt.ids) :]
            torch.testing.assert_close(found, expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("oracle", ["gemma2"], indirect=True)
def test_one_model_is_base_and_reference(oracle: Oracle) -> None:
    base, reference = runners(oracle)
    batch = left_padded(PROMPTS, pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask, False)
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
        runner.logits(ids, mask, False)
        with pytest.raises(ValueError, match="padded on the left"):
            runner.logits(ids, mask, True)


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
        batch = left_padded(PROMPTS, pad_id=0, last_only=last_only)
        inputs = (batch.input_ids, batch.attention_mask, last_only)
        found, expected = worker.logits(*inputs), base.logits(*inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    torch.set_num_threads(before)
    # A request that cannot be answered is one line, and the next one is answered again.
    with pytest.raises(FolderError, match="IndexError") as caught:
        worker.logits(torch.tensor([[2, 5000]]), torch.tensor([[1, 1]]), False)
    assert "\n" not in str(caught.value)
    assert worker.logits(*inputs).shape[0] == 3
    # So is its end.
    worker._process.kill()
    with pytest.raises(FolderError, match=r"gemma2: the process that loaded it ended .* -9"):
        worker.logits(*inputs)


def custom_folder(folder: Path, base: Path, code: str) -> Path:
    """A folder whose own code runs when it is loaded."""
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "custom_gemma"
    config["auto_map"] = {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(code)
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    return folder


CUSTOM = """
import os
from transformers import Gemma2Config, Gemma2ForCausalLM
print("printing is no answer")
os.write(1, b"neither is this")
{code}
class C(Gemma2Config):
    model_type = "custom_gemma"
class M(Gemma2ForCausalLM):
    config_class = C
"""


def test_a_folder_runs_its_own_code_without_bakeout(bases: dict[str, Path], tmp_path: Path) -> None:
    plain = custom_folder(tmp_path / "plain", bases["gemma2"], CUSTOM.format(code=""))
    needy = CUSTOM.format(code="def late():\n    pass\nfrom bake import recipe")
    asking = custom_folder(tmp_path / "asking", bases["gemma2"], needy)
    with TorchRunner(plain) as first, TorchRunner(asking) as second:
        assert first.load("float32") == "M"
        assert list(Path(first._scratch.name).rglob("custom.py"))  # not in everybody's cache
        with pytest.raises(FolderError, match=r"asking: .*it tried to import bake") as caught:
            second.load("float32")
        assert "\n" not in str(caught.value)


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
    assert not Path(runner._scratch.name).exists()
