"""Compiled folders against the hooked reference: every method, family, number of features."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import RecipeWriter, save_gemma_scope, save_sae_lens, tiny_base, tiny_sae
from safetensors.torch import load_file
from test_exactness import FEATURES, METHODS

from bake.errors import BakeoutError, OutputError
from bake.recipe import Recipe
from bakeout.baking import bake_recipe
from export.compiled import LAYERS_SHARD, plan_compiled, write_compiled
from verify.parity import kl_nats
from verify.reference import Oracle
from verify.stock import load_base
from verify.whole_sae import load_sites

STOCK = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}


def prompts() -> torch.Tensor:
    """[4, 24] token ids, BOS first and once more in the middle."""
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = ids[1, 9] = 2
    return ids


def compile_recipe(recipe: Path, out: Path, **options: Any) -> Path:
    """Bake a recipe and compile the checkpoint; returns the compiled folder."""
    bake_recipe(recipe, out / "checkpoint", force=False)
    plan = plan_compiled(out / "checkpoint", **options)
    return write_compiled(plan, out / "compiled", card="# card\n")


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab] float32."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float().flatten(0, 1)


def compare(
    tmp_path: Path, write_recipe: RecipeWriter, tables: list[dict[str, Any]], **base: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of base, hooked reference, compiled folder: [tokens, vocab]; tokens fired [tokens]."""
    recipe_file = write_recipe(*tables, base=base)
    folder = compile_recipe(recipe_file, tmp_path)
    recipe = Recipe.load(recipe_file)
    stock = load_base(recipe)
    oracle = Oracle(stock, load_sites(recipe))
    model, info = tf.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == type(stock).__name__
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = prompts()
    before = logits_of(stock, ids)
    with oracle.applied() as hooked:
        reference = logits_of(hooked, ids)
    assert oracle._fired is not None
    return before, reference, logits_of(model, ids), oracle._fired.flatten()


def sae_tables(tmp_path: Path, method: str, features: list[int], n: int) -> list[dict[str, Any]]:
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1)
    save_gemma_scope(tmp_path / "layer_2", tiny_sae(1))
    names = ["one", "layer_2"][:n]
    return [{"sae": {"path": name}, "features": features, **METHODS[method]} for name in names]


@pytest.mark.parametrize("hook_points", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", STOCK)
def test_float32(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str, hook_points: int
) -> None:
    tiny_base(tmp_path / "base", family)
    tables = sae_tables(tmp_path, method, FEATURES, hook_points)
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired.any()
    assert kl_nats(reference, before).mean() > 0.1 or method == "zero"
    assert kl_nats(reference, found).mean() <= 1e-8
    assert torch.equal(found.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("k", [1, 3, 17, 40])
@pytest.mark.parametrize("method", ["clamp", "refusal", "refusal and clamp", "random decoder"])
def test_any_number_of_features(
    tmp_path: Path, write_recipe: RecipeWriter, method: str, k: int
) -> None:
    tiny_base(tmp_path / "base")
    features = [f for f in range(k + 1) if f != 30][:k]
    tables = sae_tables(tmp_path, method, features, 1)
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired.any() and kl_nats(reference, before).mean() > 1e-3
    assert kl_nats(reference, found).mean() <= 1e-8


@pytest.mark.parametrize("exempt_bos", [True, False])
def test_bos_is_exempt_by_its_id_wherever_it_stands(
    tmp_path: Path, write_recipe: RecipeWriter, exempt_bos: bool
) -> None:
    tiny_base(tmp_path / "base")
    (table,) = sae_tables(tmp_path, "clamp", list(range(40)), 1)
    before, reference, found, fired = compare(
        tmp_path, write_recipe, [table | {"exempt_bos": exempt_bos}]
    )
    bos = (prompts() == 2).flatten()
    assert bos.sum() == 5 and fired[bos].any() != exempt_bos
    assert kl_nats(reference, found).max() <= 1e-6
    assert (kl_nats(before, found)[0] <= 1e-9) == exempt_bos


@pytest.mark.parametrize("hook_points", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", STOCK)
def test_bfloat16_is_as_near_as_the_hook_in_bfloat16(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str, hook_points: int
) -> None:
    tiny_base(tmp_path / "base", family, dtype="bfloat16")
    tables = sae_tables(tmp_path, method, FEATURES, hook_points)
    before, hooked, found, fired = compare(tmp_path, write_recipe, tables)
    recipe = Recipe.load(write_recipe(*tables, base={"dtype": "float32"}))
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    with oracle.applied() as model:
        exact = logits_of(model, prompts())
    own = kl_nats(exact, hooked).mean()
    print(f"{family} {method} {hook_points}: {kl_nats(exact, found).mean():.1e} hook {own:.1e}")
    assert fired.any()
    assert kl_nats(exact, found).mean() <= 3 * own + 1e-3
