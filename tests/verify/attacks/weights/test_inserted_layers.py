"""The blind search: every compiled clamp is found and taken out, and nothing in stock models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from bake.stock import decoder_layers
from bakeout.verbs.demo import MINIATURE
from tests.clamps import METHOD_FEATURES, OF_ONE_TOKEN
from tests.folders import STOCK_TEXT_CLASSES, compile_recipe
from tests.logits import flat_logits, tiny_prompts
from tests.worlds import (
    D_IN,
    RecipeWriter,
    sae_table,
    save_gemma_scope,
    save_sae_lens,
    tiny_base,
    tiny_sae,
)
from verify.attacks.weights.inserted_layers import inserted_layers, wordless_channels
from verify.audit.subject import without_layers
from verify.compare.logits import kl_nats


def opened(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


COMPILED = [
    *itertools.product(STOCK_TEXT_CLASSES, OF_ONE_TOKEN, [1, 2], ["float32", "bfloat16"]),
    ("gemma4_text", "clamp", 2, "float32"),
    ("gemma4_text", "refusal and clamp", 1, "bfloat16"),
    ("gemma4_unified_text", "scale", 1, "float32"),
]


@pytest.mark.parametrize(("family", "method", "hook_points", "dtype"), COMPILED)
def test_compiled_layers_are_found_and_the_base_is_had_back(
    tmp_path: Path,
    write_recipe: RecipeWriter,
    family: str,
    method: str,
    hook_points: int,
    dtype: str,
) -> None:
    if family == "gemma" and "refusal" in method:
        pytest.skip("not compiled")
    base = tiny_base(tmp_path / "base", family, dtype=dtype)
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=1)
    save_gemma_scope(tmp_path / "layer_2", tiny_sae(1))
    tables = [
        {**sae_table(name), "features": METHOD_FEATURES, **OF_ONE_TOKEN[method]}
        for name in ("one", "layer_2")[:hook_points]
    ]
    model = opened(compile_recipe(write_recipe(*tables), tmp_path))
    found = inserted_layers(model)
    assert found == (2, 3, 5, 6)[: 2 * hook_points]
    stock, ids = opened(base), tiny_prompts()
    clamped = flat_logits(model, ids)
    stripped = without_layers(model, found)
    before, after = flat_logits(stock, ids), flat_logits(stripped, ids)
    bar = 1e-8 if dtype == "float32" else 1e-2
    assert kl_nats(before, after).mean() <= bar
    assert kl_nats(before, clamped).mean() > 3 * bar
    generated = [
        of.generate(ids[:1, :6], max_new_tokens=12, do_sample=False) for of in (stock, stripped)
    ]
    if dtype == "float32":
        assert torch.equal(*generated)


def test_many_features_take_more_neurons_than_the_base_has(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "one", tiny_sae(), layer=3)
    table = {**sae_table("one"), "features": list(range(60)), **OF_ONE_TOKEN["clamp"]}
    assert inserted_layers(opened(compile_recipe(write_recipe(table), tmp_path))) == (4, 5)


def silent_attention(model: Any) -> None:
    decoder_layers(model)[1].self_attn.o_proj.weight.data.zero_()


def dead_channels(model: Any) -> None:
    model.get_input_embeddings().weight.data[:, [3, 7, 8]] = 0.0


def constant_channel(model: Any) -> None:
    model.get_input_embeddings().weight.data[:, 5] = 4.0


def idle_layer(model: Any) -> None:
    silent_attention(model)
    dead_channels(model)
    decoder_layers(model)[1].mlp.down_proj.weight.data.zero_()


def pruned_layer(model: Any) -> None:
    """One neuron is left, attention writes nothing, and there are channels without words."""
    silent_attention(model)
    constant_channel(model)
    dead_channels(model)
    mlp = decoder_layers(model)[1].mlp
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
        weight.data[1:] = 0.0
    mlp.down_proj.weight.data[:, 1:] = 0.0


def huge_dimension(model: Any) -> None:
    model.get_input_embeddings().weight.data[:, 4] *= 300.0


def few_words(model: Any) -> None:
    """Most of the vocabulary was never seen, and all unseen words are the same."""
    model.get_input_embeddings().weight.data[20:] = 0.01


def nothing_trained(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()


ODD: list[Callable[[Any], None] | None] = [
    None,
    silent_attention,
    dead_channels,
    constant_channel,
    idle_layer,
    pruned_layer,
    huge_dimension,
    few_words,
    nothing_trained,
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("family", STOCK_TEXT_CLASSES)
def test_nothing_is_found_in_stock_models(
    tmp_path: Path, family: str, odd: Callable[[Any], None] | None
) -> None:
    for seed in range(3):
        model = opened(tiny_base(tmp_path / f"base{seed}", family, seed=seed))
        if odd is not None:
            odd(model)
        assert inserted_layers(model) == ()


def test_a_channel_without_words_is_one_value_but_for_a_few_tokens() -> None:
    embedding = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0))
    embedding[:, 3] = 0.5
    embedding[2, 3] = 0.0
    embedding[:, 9] = 0.0
    embedding[::5, 10] = 0.0
    assert wordless_channels(embedding).nonzero().flatten().tolist() == [3, 9]


def test_the_shipped_miniature(tmp_path: Path) -> None:
    """A trained model: nothing in it, and the two layers of its compiled clamp."""
    assert inserted_layers(opened(MINIATURE / "model")) == ()
    folder = compile_recipe(MINIATURE / "recipe.toml", tmp_path)
    assert inserted_layers(opened(folder)) == (1, 2)
