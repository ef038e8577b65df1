"""Checkpoint against hooked reference: every method, every family, one and two hook points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from bake.recipe import Recipe
from bake.stock import load_base
from bakeout.verbs.baking import bake_recipe
from tests.clamps import METHOD_FEATURES, METHOD_TABLES
from tests.worlds import (
    KINDS,
    RecipeWriter,
    sae_table,
    save_gemma_scope,
    save_sae_lens,
    tiny_base,
    tiny_sae,
)
from verify.compare.logits import kl_nats
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites


def compare(
    tmp_path: Path, write_recipe: RecipeWriter, tables: list[dict[str, Any]], **base: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(base, reference and checkpoint logits [tokens, vocab], tokens fired) on random prompts."""
    recipe_file = write_recipe(*tables, base=base)
    bake_recipe(recipe_file, tmp_path / "out", force=False)
    recipe = Recipe.load(recipe_file)
    stock = load_base(recipe)
    oracle = Oracle(stock, load_sites(recipe))
    auto = (
        tf.AutoModelForImageTextToText
        if type(stock).__name__.endswith("ConditionalGeneration")
        else tf.AutoModelForCausalLM
    )
    checkpoint = auto.from_pretrained(
        tmp_path / "out", trust_remote_code=True, attn_implementation="eager"
    )
    assert checkpoint.dtype == stock.dtype
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    with torch.no_grad():
        before = stock(input_ids=ids).logits
        with oracle.applied() as hooked:
            reference = hooked(input_ids=ids).logits
        found = checkpoint(input_ids=ids).logits
    flat = [logits.float().flatten(0, 1) for logits in (before, reference, found)]
    return flat[0], flat[1], flat[2], oracle.tokens_fired


@pytest.mark.parametrize("hook_points", [1, 2])
@pytest.mark.parametrize("method", METHOD_TABLES)
@pytest.mark.parametrize("family", KINDS)
def test_float32(
    tmp_path: Path, write_recipe: RecipeWriter, family: str, method: str, hook_points: int
) -> None:
    tiny_base(tmp_path / "base", family)
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1)
    save_gemma_scope(tmp_path / "layer_2", tiny_sae(1))
    names = ["one", "layer_2"][:hook_points]
    tables = [
        {**sae_table(name), "features": METHOD_FEATURES, **METHOD_TABLES[method]} for name in names
    ]
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired > 0
    assert (before - reference).abs().max() > 0.1  # the clamp moves the model
    assert (found - reference).abs().max() <= 1e-4
    assert torch.equal(found.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_float32_on_other_saes(
    tmp_path: Path, write_recipe: RecipeWriter, architecture: str
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae(), architecture=architecture)
    table = {"sae": {"path": "sae"}, "features": METHOD_FEATURES, **METHOD_TABLES["clamp"]}
    before, reference, found, fired = compare(tmp_path, write_recipe, [table])
    assert fired > 0 and (before - reference).abs().max() > 0.1
    assert (found - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("method", METHOD_TABLES)
def test_float32_on_a_topk_sae(tmp_path: Path, write_recipe: RecipeWriter, method: str) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1, architecture="topk", k=9)
    save_sae_lens(tmp_path / "two", tiny_sae(1), layer=2)
    tables = [
        {"sae": {"path": name}, "features": METHOD_FEATURES, **METHOD_TABLES[method]}
        for name in ("one", "two")
    ]
    before, reference, found, fired = compare(tmp_path, write_recipe, tables)
    assert fired > 0 and (before - reference).abs().max() > 0.1
    assert (found - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("exempt_bos", [True, False])
def test_bos_is_exempt_only_where_the_recipe_says_so(
    tmp_path: Path, write_recipe: RecipeWriter, exempt_bos: bool
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    features = list(range(40))  # so many that one of them fires on BOS
    table = {"sae": {"path": "sae"}, "features": features, **METHOD_TABLES["clamp"]}
    before, reference, found, _ = compare(
        tmp_path, write_recipe, [table | {"exempt_bos": exempt_bos}]
    )
    assert (found - reference).abs().max() <= 1e-4
    assert torch.equal(found[0], before[0]) == exempt_bos


@pytest.mark.parametrize("family", KINDS)
def test_bfloat16(tmp_path: Path, write_recipe: RecipeWriter, family: str) -> None:
    tiny_base(tmp_path / "base", family)
    save_sae_lens(tmp_path / "sae", tiny_sae())
    table = {
        "sae": {"path": "sae"},
        "features": METHOD_FEATURES,
        **METHOD_TABLES["conditional clamp"],
    }
    before, reference, found, fired = compare(tmp_path, write_recipe, [table], dtype="bfloat16")
    assert fired > 0
    assert kl_nats(reference, before).mean() > 0.05
    assert kl_nats(reference, found).mean() <= 1e-3
