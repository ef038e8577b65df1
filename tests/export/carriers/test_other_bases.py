"""Adapters beside a fine-tune of their base: as a LoRA at their side, and merged into a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import bakeout
from bake.errors import RecipeError
from bake.recipe import Recipe
from bakeout.cli import run
from bakeout.verbs.baking import bake_recipe
from tests.folders import make_adapter
from tests.logits import tiny_prompts
from tests.worlds import tiny_base, tiny_tokenizer
from verify.run import verify_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, `checkpoint/`, `adapter/`, `lora/` of a LoRA that changes the base, and `tuned/`."""
    assert bakeout
    folder = make_adapter(tmp_path_factory.mktemp("work"))
    tuned = get_peft_model(opened(folder / "base"), LoraConfig(target_modules="all-linear", r=2))
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    tuned.save_pretrained(folder / "lora")
    tiny_tokenizer(folder / "tuned")
    tuned.merge_and_unload().save_pretrained(folder / "tuned")
    return folder


def opened(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tiny_prompts()).logits
    return found


@pytest.fixture(scope="module")
def wanted(work: Path) -> torch.Tensor:
    """What the clamp makes of the tuned base: baked onto it."""
    text = (work / "recipe.toml").read_text().replace('model = "base"', 'model = "tuned"')
    (work / "tuned.toml").write_text(text)
    bake_recipe(work / "tuned.toml", work / "tuned-checkpoint", force=False)
    found = logits(opened(work / "tuned-checkpoint"))
    assert (found - logits(opened(work / "tuned"))).abs().max() > 0.1
    assert (found - logits(opened(work / "checkpoint"))).abs().max() > 0.01
    return found


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_con")
def test_a_lora_lies_beside_a_clamp_in_either_order(work: Path, wanted: torch.Tensor) -> None:
    clamped = PeftModel.from_pretrained(opened(work / "base"), work / "adapter")
    both = PeftModel.from_pretrained(clamped.get_base_model(), work / "lora")
    assert torch.allclose(logits(both), wanted, atol=1e-4)
    tuned = PeftModel.from_pretrained(opened(work / "base"), work / "lora")
    both = PeftModel.from_pretrained(tuned.get_base_model(), work / "adapter")
    assert torch.allclose(logits(both), wanted, atol=1e-4)
    with both.disable_adapter():
        assert torch.allclose(logits(both), logits(opened(work / "tuned")), atol=1e-4)


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_con")
def test_a_lora_is_trained_under_a_clamp(work: Path) -> None:
    clamped = PeftModel.from_pretrained(opened(work / "base"), work / "adapter")
    config = LoraConfig(target_modules="all-linear", r=2)
    model = get_peft_model(clamped.get_base_model(), config)
    before = logits(model)
    assert torch.equal(before, logits(opened(work / "checkpoint")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tiny_prompts()
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and not torch.equal(before, logits(model))


def test_rebased_it_belongs_to_the_merged_base(
    work: Path, wanted: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "rebased"
    arguments = ("adapter", work / "checkpoint", "--out", out, "--rebase", work / "tuned")
    assert run(["export", *map(str, arguments)]) == 0
    assert torch.equal(logits(PeftModel.from_pretrained(opened(work / "tuned"), out)), wanted)
    with pytest.raises(ValueError, match=r"not the base that the adapter belongs to .tuned"):
        PeftModel.from_pretrained(opened(work / "base"), out)
    assert json.loads((out / "adapter_config.json").read_text())["revision"] is None
    of_tuned, of_base = Recipe.load(work / "tuned.toml"), Recipe.load(work / "recipe.toml")
    report = verify_folder(out, of_tuned, frozenset({"integrity"}))
    assert report.verdict == "pass", report.failures
    with pytest.raises(RecipeError, match="has other weights than those that rebased was made for"):
        verify_folder(out, of_base, frozenset({"integrity"}))


def test_a_base_of_another_shape_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_base(tmp_path / "other")
    file = other / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ("adapter", work / "checkpoint", "--out", tmp_path / "out", "--rebase", other)
    assert run(["export", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "model.layers.2.mlp.up_proj.weight is (48, 31); expected (48, 32)" in said
    assert not (tmp_path / "out").exists()


def test_transformers_own_load_adapter_is_told_from_damage(work: Path) -> None:
    model = opened(work / "base")
    model.load_adapter(str(work / "adapter"))
    with pytest.raises(ValueError, match=r"was not loaded.*PeftModel.from_pretrained"):
        model(input_ids=tiny_prompts())
