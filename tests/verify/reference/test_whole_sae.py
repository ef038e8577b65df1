"""Where an SAE comes from and where it sits; its arithmetic is tested with the oracle."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bake.errors import SAEError
from bake.recipe import Recipe
from tests.worlds import cut, save_gemma_scope, save_gemma_scope_2, save_sae_lens, tiny_sae
from verify.reference.whole_sae import Site, load_sites

RecipeWriter = Callable[..., Path]


def load(write_recipe: RecipeWriter, path: str, **table: Any) -> list[Site]:
    clamp = {"sae": {"path": path}, "method": "zero", "features": [1], **table}
    return load_sites(Recipe.load(write_recipe(clamp)))


def test_layer_comes_from_the_recipe_else_the_sae_else_the_folders_record(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    save_sae_lens(tmp_path / "lens", tiny_sae(), hook_name="blocks.2.hook_resid_pre")
    assert load(write_recipe, "lens")[0].layer == 1
    assert load(write_recipe, "lens", hook_point="blocks.1.hook_resid_post")[0].layer == 1
    save_gemma_scope(tmp_path / "plain", tiny_sae())
    assert load(write_recipe, "plain", hook_point="blocks.3.hook_resid_post")[0].layer == 3
    digest = hashlib.sha256((tmp_path / "plain" / "params.npz").read_bytes()).hexdigest()
    clamp = {"sae": {"path": "plain"}, "method": "zero", "features": [1]}
    recorded = {digest: "blocks.3.hook_resid_pre"}
    assert load_sites(Recipe.load(write_recipe(clamp)), recorded)[0].layer == 2
    clamp["hook_point"] = "blocks.1.hook_resid_post"
    assert load_sites(Recipe.load(write_recipe(clamp)), recorded)[0].layer == 1
    save_gemma_scope_2(tmp_path / "layer_9_width_16k", tiny_sae())
    assert load(write_recipe, "layer_9_width_16k")[0].layer == 1  # as its config.json says


def test_weights_are_taken_as_they_are(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    expected = tiny_sae(5)
    save_sae_lens(tmp_path / "lens", expected)
    save_gemma_scope(tmp_path / "layer_1", expected)
    for path, on_input in (("lens", True), ("layer_1", False)):
        sae = load(write_recipe, path, hook_point="blocks.1.hook_resid_post")[0].sae
        assert sae.cfg.apply_b_dec_to_input is on_input
        assert sae.W_dec.dtype == sae.dtype == torch.float64
        for name, array in vars(expected).items():
            assert np.array_equal(getattr(sae, name).numpy(), array)


def test_a_release_is_left_to_sae_lens(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens import SAE

    folder = save_sae_lens(tmp_path / "lens", tiny_sae(), layer=2)
    asked: list[Any] = []

    def from_pretrained(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        if args[0] == "gone":
            raise ValueError("Release gone not found\nand more")
        return SAE.load_from_disk(folder)

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    source = {"release": "gemma-scope-2b-pt-res-canonical", "id": "layer_2/width_16k/canonical"}
    clamp = {"sae": source, "method": "zero", "features": [1]}
    assert load_sites(Recipe.load(write_recipe(clamp)))[0].layer == 2
    names = (source["release"], source["id"])
    assert asked == [(names, {"device": "cpu", "dtype": "float32"})]
    clamp["sae"] = {"release": "gone", "id": "x"}
    with pytest.raises(SAEError, match=r"gone/x: sae_lens cannot load it \(Release gone not"):
        load_sites(Recipe.load(write_recipe(clamp)))


def test_sites_come_by_layer(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    for layer in (2, 0):
        save_sae_lens(tmp_path / f"sae{layer}", tiny_sae(), layer=layer)
    tables = [
        {"sae": {"path": f"sae{layer}"}, "method": "zero", "features": [1]} for layer in (2, 0)
    ]
    assert [site.layer for site in load_sites(Recipe.load(write_recipe(*tables)))] == [0, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"hook_point": "blocks.2.hook_resid_post"},
            "hook_name says blocks.1.*, the recipe says blocks.2",
        ),
        ({"features": [3, 64]}, "feature 64 is out of range; expected 0 to 63"),
        (
            {"method": "refusal", "refusal_feature": 99, "value": 1.0},
            "feature 99 is out of range",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    table: dict[str, Any], message: str, tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    save_sae_lens(tmp_path / "lens", tiny_sae())
    with pytest.raises(SAEError, match=message):
        load(write_recipe, "lens", **table)


def test_unusable_folders_are_refused_in_one_line(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    save_gemma_scope(tmp_path / "nowhere", tiny_sae())
    save_sae_lens(tmp_path / "mlp", tiny_sae(), hook_name="blocks.1.hook_mlp_out")
    save_sae_lens(tmp_path / "normed", tiny_sae(), normalize_activations="layer_norm")
    whitened = {"normalize_activations": "covariance_whitening"}
    save_sae_lens(tmp_path / "whitened", tiny_sae(), **whitened)
    cut(save_sae_lens(tmp_path / "cut", tiny_sae()) / "sae_weights.safetensors", 500)
    arrays = {"W_enc": np.ones((4, 8), np.float32)}
    (tmp_path / "layer_1_few").mkdir()
    np.savez(tmp_path / "layer_1_few" / "params.npz", **arrays)
    (tmp_path / "layer_1_pickle").mkdir()
    (tmp_path / "layer_1_pickle" / "params.npz").write_bytes(pickle.dumps(arrays))
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("nowhere", "states no hook point"),
        ("mlp", "hook_mlp_out.*not supported"),
        ("normed", "normalize_activations is layer_norm"),
        ("whitened", "normalize_activations is covariance_whitening"),
        ("cut", "sae_lens cannot load it"),
        ("layer_1_few", "has no b_enc; it has W_enc"),
        ("layer_1_pickle", "cannot load it"),
        ("empty", "no SAE there; expected"),
    ):
        with pytest.raises(SAEError, match=message) as caught:
            load(write_recipe, path)
        assert "\n" not in str(caught.value)
