"""SAEs of another place than the residual stream: what bake refuses, and verify by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bake.errors import SAEError
from bake.recipe import Recipe
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from export.manifest import Manifest
from tests.worlds import (
    D_IN,
    D_SAE,
    FAMILIES,
    OTHER_PLACES,
    save_gemma_scope,
    save_gemma_scope_2,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    write_questions,
    write_texts,
)
from verify.reference.whole_sae import load_sites
from verify.run import verify_folder

VERIFY = {
    "forget_questions": {"path": "forget.jsonl"},
    "retain_questions": {"path": "retain.jsonl"},
    "text": {"path": "text.jsonl"},
}
LENS = {
    "lens mlp": {"hook_name": "blocks.1.hook_mlp_out"},
    "lens attention": {"hook_name": "blocks.1.attn.hook_z"},
    "lens middle": {"hook_name": "blocks.1.hook_resid_mid"},
    "lens module": {"hook_name": "model.layers.1.mlp"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bases") / request.param, request.param)


def recipe_over(tmp_path: Path, base: Path, write_recipe: Any, path: str, **more: Any) -> Recipe:
    write_questions(tmp_path / "forget.jsonl", 1)
    write_questions(tmp_path / "retain.jsonl", 1)
    write_texts(tmp_path / "text.jsonl", 1)
    clamp = {"sae": {"path": path}, "method": "clamp", "features": [1], "value": -3.0, **more}
    return Recipe.load(write_recipe(clamp, base={"model": str(base)}, verify=VERIFY))


def bake(recipe: Recipe, out: Path) -> Path:
    return write_checkpoint(plan_checkpoint(recipe), out, card="# card\n")


@pytest.mark.parametrize("place", [*LENS, *OTHER_PLACES])
def test_bake_refuses_it_and_so_does_verify_where_bake_is_made_to_take_it(
    tmp_path: Path, base: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place in LENS:
        save_sae_lens(tmp_path / place, tiny_sae(), **LENS[place])
    elif "width_16k/" in place:
        save_gemma_scope(tmp_path / place, tiny_sae())
    else:
        (save_gemma_scope_2(tmp_path / place, tiny_sae()) / "config.json").unlink()
    recipe = recipe_over(tmp_path, base, write_recipe, place)
    with pytest.raises(SAEError, match="not supported"):
        plan_checkpoint(recipe)
    monkeypatch.setattr("bake.clamp.resolve_layer", lambda *_: (1, "blocks.1.hook_resid_post"))
    folder = bake(recipe, tmp_path / "out")
    assert not verify_folder(folder, only=frozenset({"integrity"})).failures  # knows no SAE
    for only in ("parity", "integrity"):
        with pytest.raises(SAEError, match=r"not supported|which says") as caught:
            verify_folder(folder, recipe, frozenset({only}))
        assert "residual stream" in str(caught.value)


def test_the_folder_records_whose_word_it_is_and_verify_takes_it(
    tmp_path: Path, base: Path, write_recipe: Any
) -> None:
    named, silent = "gemma-scope-tiny-res/layer_1", "layer_1"
    word = {"hook_point": "blocks.1.hook_resid_post"}
    for n, (path, more, who) in enumerate([(named, {}, "SAE"), (silent, word, "recipe")]):
        save_gemma_scope(tmp_path / path, tiny_sae())
        recipe = recipe_over(tmp_path, base, write_recipe, path, **more)
        (clamp,) = Manifest.read(bake(recipe, tmp_path / f"out{n}")).clamps
        assert (clamp.hook_point, clamp.hook_point_from) == (word["hook_point"], who)
        recorded = {clamp.sae.sha256: clamp.hook_point}
        assert load_sites(recipe, recorded)[0].layer == 1
    recipe = recipe_over(tmp_path, base, write_recipe, named)
    with pytest.raises(SAEError, match="states no hook point, and no folder records one"):
        load_sites(recipe)
    with pytest.raises(SAEError, match=r"name layer 1 only.*give `hook_point`"):
        plan_checkpoint(recipe_over(tmp_path, base, write_recipe, silent))


def test_a_transcoder_is_refused_by_both(tmp_path: Path, base: Path, write_recipe: Any) -> None:
    from sae_lens import Transcoder, TranscoderConfig

    for n, more in enumerate(({}, {"hook_name_out": "blocks.1.hook_mlp_out"})):
        cfg = TranscoderConfig(d_in=D_IN, d_out=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False)
        cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        for key, value in more.items():
            cfg.metadata[key] = value
        Transcoder(cfg).save_model(tmp_path / f"coder{n}")
        recipe = recipe_over(tmp_path, base, write_recipe, f"coder{n}")
        with pytest.raises(SAEError, match=r"transcoder|hook_name_out"):
            plan_checkpoint(recipe)
        with pytest.raises(SAEError, match="is a transcoder"):
            load_sites(recipe)
