"""Every carrier as a model in this process, with and without its clamp."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.errors import BakeoutError, FolderError, RecipeError
from bake.recipe import Recipe
from bakeout.verbs.exporting import export_adapter, export_compiled
from tests.verify.audit.audited import audited, audited_world
from tests.worlds import tiny_base, tiny_tokenizer
from verify.audit.subject import Subject, check_subject, open_subject, without_layers

IDS = torch.tensor([[2, 10, 11, 12, 13, 14, 15, 16, 17]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    audited_world(folder)
    export_adapter(folder / "checkpoint", folder / "adapter", force=False)
    export_compiled(folder / "checkpoint", folder / "compiled", pad=None, dtype=None, force=False)
    shutil.copytree(folder / "base", folder / "plain")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_every_carrier_computes_the_clamp(world: Path) -> None:
    base = logits(audited(world).base())
    clamped = logits(audited(world).model())
    assert (clamped - base).abs().max() > 0.1
    torch.testing.assert_close(logits(audited(world, "adapter").model()), clamped)
    compiled = logits(audited(world, "compiled").model())
    torch.testing.assert_close(compiled, clamped, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", ["checkpoint", "adapter", "compiled"])
def test_without_its_clamp_it_is_the_base(world: Path, name: str) -> None:
    subject = audited(world, name)
    assert subject.strips
    base = logits(subject.base())
    torch.testing.assert_close(logits(subject.stripped()), base, atol=1e-4, rtol=1e-4)
    # A copy that is changed changes no other.
    model = subject.strip(subject.model())
    assert (logits(subject.model()) - logits(model)).abs().max() > 0.1


def test_a_strangers_plain_folder_has_nothing_to_take_out(world: Path) -> None:
    subject = audited(world, "plain")
    assert (subject.carrier, subject.strips, subject.stripped()) == (None, False, None)
    assert check_subject(world / "plain") == ()
    torch.testing.assert_close(logits(subject.model()), logits(subject.base()))


def test_a_model_can_be_trained_with_its_clamp(world: Path) -> None:
    for name in ("checkpoint", "adapter", "compiled"):
        model = audited(world, name).model().train().requires_grad_(True)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grad = model.get_input_embeddings().weight.grad
        assert grad is not None
        assert grad.abs().max() > 0


def test_deleted_layers_leave_a_model_that_runs_from_a_cache(world: Path) -> None:
    model = without_layers(audited(world, "plain").model(), [1, 2])
    assert model.config.num_hidden_layers == 2
    whole = logits(model)
    cached = model(input_ids=IDS[:, :-1], use_cache=True)
    last = model(input_ids=IDS[:, -1:], past_key_values=cached.past_key_values)
    torch.testing.assert_close(last.logits[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_what_was_changed_is_broken(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "checkpoint", tmp_path / "changed")
    weights = next((tmp_path / "changed").glob("model-0*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (failure,) = check_subject(tmp_path / "changed")
    assert failure.kind == "integrity"
    assert "changed" in failure.what


def test_code_of_others_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "plain", tmp_path / "stranger")
    (tmp_path / "stranger" / "modeling_other.py").write_text("raise SystemExit\n")
    with pytest.raises(FolderError, match=r"modeling_other\.py: may be run"):
        check_subject(tmp_path / "stranger")


def test_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer(tiny_base(tmp_path / "other", "gemma3_text"))
    recipe = Recipe.load(world / "recipe.toml")
    with pytest.raises(RecipeError, match="has Gemma3ForCausalLM, the recipe's base Gemma2For"):
        open_subject(other, recipe)
    shorter = without_layers(audited(world, "plain").model(), [1])
    shorter.save_pretrained(tmp_path / "shorter")
    with pytest.raises(RecipeError, match=r"has num_hidden_layers 3, the recipe's base 4; expec"):
        open_subject(tiny_tokenizer(tmp_path / "shorter"), recipe)
    with pytest.raises(BakeoutError, match="no folder"):
        check_subject(tmp_path / "nothing")
    moved = recipe.model_copy(update={"base": recipe.base.model_copy(update={"model": "plain"})})
    moved._folder = world
    with pytest.raises(RecipeError, match="has base base, the recipe's base plain; expected"):
        open_subject(world / "checkpoint", moved)
    assert isinstance(open_subject(world / "checkpoint", recipe), Subject)
