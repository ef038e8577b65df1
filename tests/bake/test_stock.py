from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

from bake.errors import ModelError
from bake.families import family_of
from bake.recipe import Recipe
from bake.stock import decoder_layers, load_base, load_tokenizer
from tests.worlds import KINDS, cut, tiny_base, tiny_tokenizer

ZERO = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}


def recipe_of(write_recipe: Callable[..., Path], **base: Any) -> Recipe:
    return Recipe.load(write_recipe(ZERO, base=base))


@pytest.mark.parametrize("family", KINDS)
def test_every_family_loads_in_its_stock_class(
    family: str, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    tiny_base(tmp_path / "base", family, dtype="bfloat16")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = load_base(recipe_of(write_recipe, dtype=dtype))
        assert type(model).__name__ == family_of(family.partition(",")[0]).architecture
        assert model.dtype == expected
        assert model.config._attn_implementation == "eager"
        assert not model.training
        assert len(decoder_layers(model)) == 4


def test_what_cannot_be_loaded_is_one_line(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    tiny_base(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["architectures"] = ["Gemma2ForSequenceClassification"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    cut(tiny_base(tmp_path / "cut") / "model.safetensors", 900)
    weights = load_file(tiny_base(tmp_path / "fewer") / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "fewer" / "model.safetensors", metadata={"format": "pt"})
    for model, message in (
        ("fewer", r"has no model\.layers\.2\.mlp\.up_proj\.weight"),
        ("gone", "no such folder beside the recipe"),
        ("owner/gone", "cannot be downloaded at revision main"),
        ("other", "its architecture is Gemma2ForSequenceClassification; expected one of Gemma"),
        ("cut", "transformers cannot load it"),
    ):
        with pytest.raises(ModelError, match=f"base.model {model}: {message}") as caught:
            load_base(recipe_of(write_recipe, model=model))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_there_is_not_is_one_line(
    device: str, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    tiny_base(tmp_path / "base")
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [1]}
    recipe = Recipe.load(write_recipe(clamp))
    with pytest.raises(ModelError, match=f"--device {device}: torch cannot run") as error:
        load_base(recipe, device)
    assert "\n" not in str(error.value)


def test_the_tokenizer_is_the_bases(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    tiny_base(tmp_path / "base")
    recipe = recipe_of(write_recipe)
    with pytest.raises(ModelError, match="base model base: has no tokenizer"):
        load_tokenizer(recipe)
    tiny_tokenizer(tmp_path / "base")
    assert load_tokenizer(recipe).bos_token == "<bos>"


def test_special_tokens_lead_to_no_other_file(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    base = tiny_tokenizer(tiny_base(tmp_path / "base"))
    recipe = recipe_of(write_recipe)
    tokens = {"bos_token": "<bos>", "additional_special_tokens": ["<start_of_turn>"]}
    (base / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert load_tokenizer(recipe).bos_token == "<bos>"
    elsewhere = (base / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    other = tokens | {"tokenizer_file": str(elsewhere)}
    (base / "special_tokens_map.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match="says 'tokenizer_file'; expected tokens alone"):
        load_tokenizer(recipe)
