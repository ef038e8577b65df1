from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bake.errors import FolderError, RecipeError
from bake.recipe import Recipe
from export.clamped import clamped_layers, read_config
from verify.clamped_folder import check_layers, check_shape, fitted_recipe, own_recipe

HUB_SAE = {"release": "gemma-scope-2b-pt-res-canonical", "id": "layer_7/width_16k/canonical"}
HUB_QUESTIONS = {"dataset": "cais/wmdp", "config": "wmdp-bio"}
HUB_TEXT = {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"}


def recipe_data(
    *saes: dict[str, str], model: str = "google/gemma-2-2b", features: Any = (1,), **verify: Any
) -> dict[str, Any]:
    features = features if features == "select" else list(features)
    return {
        "schema": 1,
        "base": {"model": model},
        "clamp": [{"sae": sae, "method": "zero", "features": features} for sae in saes],
        "select": {"forget": {"path": "f"}, "retain": {"path": "r"}},
        "verify": {
            "forget_questions": HUB_QUESTIONS,
            "retain_questions": HUB_QUESTIONS,
            "text": HUB_TEXT,
            **verify,
        },
    }


def parse(data: dict[str, Any], folder: Path) -> Recipe:
    return Recipe.parse(data, name="test", folder=folder)


def write(folder: Path, layers: list[int], recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    sites = [{"layer": layer, "k": 1, "exempt_bos": True} for layer in layers]
    section = {"schema": 1, "sites": sites, "exempt_token_ids": [2]}
    config = {"sae_clamp": section, "hidden_size": 32, "vocab_size": 99}
    (folder / "config.json").write_text(json.dumps(config))
    if recipe is not None:
        (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return read_config(folder)


def test_layers_come_in_order(tmp_path: Path) -> None:
    assert clamped_layers(write(tmp_path, [7, 3])) == [3, 7]


@pytest.mark.parametrize(
    "config",
    [None, "[", "[]", "{}", '{"sae_clamp": {"sites": []}}', '{"sae_clamp": {"sites": [1]}}'],
)
def test_a_config_without_clamps_is_no_clamped_checkpoint(
    config: str | None, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(FolderError, match=r"config\.json: .*; expected"):
        read_config(tmp_path)


@pytest.mark.parametrize("table", ["select", "distill"])
@pytest.mark.parametrize("path", ["s3://bucket/a", "https://host/a.parquet", "/home/a.txt", "../a"])
def test_own_recipe_is_not_followed_out_of_its_folder(
    table: str, path: str, tmp_path: Path
) -> None:
    corpora = {"forget": {"path": "a.jsonl"}, "retain": {"path": path}}
    for told, usable in ((corpora | {"retain": {"path": "b.jsonl"}}, True), (corpora, False)):
        write(tmp_path, [7], {**recipe_data(HUB_SAE), table: told})
        assert (own_recipe(tmp_path) is not None) is usable


def test_own_recipe_counts_only_where_the_hub_has_everything(tmp_path: Path) -> None:
    assert own_recipe(tmp_path) is None
    for data, usable in (
        (recipe_data(HUB_SAE), True),
        (recipe_data(HUB_SAE, model="model"), False),
        (recipe_data({"path": "sae"}), False),
        (recipe_data(HUB_SAE, {"path": "sae"}), False),
        (recipe_data(HUB_SAE, text={"path": "text.jsonl"}), False),
        (recipe_data(HUB_SAE, retain_questions={"dataset": "questions"}), False),
        ({k: v for k, v in recipe_data(HUB_SAE).items() if k != "verify"}, False),
    ):
        write(tmp_path, [7], data)
        assert (own_recipe(tmp_path) is not None) is usable
    (tmp_path / "recipe.toml").write_text("[")
    with pytest.raises(FolderError, match=r"recipe\.toml: cannot be read"):
        own_recipe(tmp_path)


def test_a_recipe_of_another_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = write(folder, [3, 7])
    with pytest.raises(RecipeError, match=r"has 1 clamp, checkpoint has 2 clamps \(layers 3, 7\)"):
        fitted_recipe(parse(recipe_data(HUB_SAE), tmp_path), folder, config)
    two = parse(recipe_data(HUB_SAE, {"path": "sae"}), tmp_path)
    assert fitted_recipe(two, folder, config) is two
    check_layers([7, 3], folder, config)
    with pytest.raises(RecipeError, match="clamps layers 3, 8, checkpoint layers 3, 7"):
        check_layers([3, 8], folder, config)


def test_a_recipe_without_verify_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, [7])
    data = recipe_data(HUB_SAE)
    del data["verify"]
    with pytest.raises(RecipeError, match=r"no \[verify\] table"):
        fitted_recipe(parse(data, tmp_path), tmp_path, config)


def test_selected_features_are_those_that_the_folder_names(tmp_path: Path) -> None:
    asked = parse(recipe_data(HUB_SAE, features="select"), tmp_path)
    config = write(tmp_path, [7], recipe_data(HUB_SAE, features=(5, 2)))
    found = fitted_recipe(asked, tmp_path, config)
    assert found.clamp[0].features == [5, 2]
    assert found.folder == asked.folder
    write(tmp_path, [7], recipe_data(HUB_SAE, features="select"))
    with pytest.raises(RecipeError, match="itself says features"):
        fitted_recipe(asked, tmp_path, config)
    (tmp_path / "recipe.toml").unlink()
    with pytest.raises(RecipeError, match=r"no recipe\.toml that names the selected"):
        fitted_recipe(asked, tmp_path, config)


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    class Base:
        hidden_size, vocab_size, num_hidden_layers = 32, 99, 4

        def get_text_config(self) -> Any:
            return self

    config = write(tmp_path, [7])
    check_shape(Base(), tmp_path, config)
    check_shape(Base(), tmp_path, {"text_config": {"hidden_size": 32}, "hidden_size": 5})
    with pytest.raises(RecipeError, match=r"base model has vocab_size 99, .* has 100"):
        check_shape(Base(), tmp_path, {**config, "vocab_size": 100})
