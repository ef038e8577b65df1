"""Where an SAE's files sit in a model, by what their folders are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bake.errors import SAEError
from bake.sae.layouts import LAYOUTS, Release, SAEFiles, open_sae_folder, resolve_layer
from tests.worlds import OTHER_PLACES, save_gemma_scope, save_gemma_scope_2, tiny_sae

RESIDUAL = "blocks.1.hook_resid_post"


def scope(tmp_path: Path, path: str) -> SAEFiles:
    """A folder of Gemma Scope, or without config.json of Gemma Scope 2."""
    if "width_16k/" in path:
        return open_sae_folder(save_gemma_scope(tmp_path / path, tiny_sae()))
    folder = save_gemma_scope_2(tmp_path / path, tiny_sae())
    (folder / "config.json").unlink()
    return open_sae_folder(folder)


@pytest.mark.parametrize("path", OTHER_PLACES)
@pytest.mark.parametrize("asked", [None, RESIDUAL])
@pytest.mark.parametrize("linked", [False, True])
def test_another_place_is_refused_by_name(
    tmp_path: Path, path: str, asked: str | None, linked: bool
) -> None:
    files = scope(tmp_path, path)
    if linked:
        (tmp_path / "layer_1").symlink_to(tmp_path / path)
        files = open_sae_folder(tmp_path / "layer_1")
    with pytest.raises(SAEError, match="not supported; expected blocks") as caught:
        resolve_layer(files, asked, "x")
    assert any(part in str(caught.value) for part in path.split("/"))


@pytest.mark.parametrize(
    "path",
    [
        "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_7",
        "mlp/gemma-scope-9b-it-res/layer_1/width_16k/average_l0_7",
        "models--google--gemma-scope-2b-pt-res/snapshots/0f/layer_1/width_16k/average_l0_7",
        "resid_post/layer_1_width_16k_l0_small",
        "resid_post_all/layer_1_width_16k_l0_big",
        "models--google--gemma-scope-2-1b-pt/snapshots/0f/resid_post/layer_1_width_16k_l0_big",
    ],
)
def test_the_residual_stream_is_known_by_name(tmp_path: Path, path: str) -> None:
    files = scope(tmp_path, path)
    assert resolve_layer(files, None, "x") == (1, RESIDUAL)
    with pytest.raises(SAEError, match=r"the recipe says blocks\.2"):
        resolve_layer(files, "blocks.2.hook_resid_post", "x")


@pytest.mark.parametrize(
    "path",
    ["layer_1/width_16k/average_l0_7", "res/layer_1/width_16k/x", "layer_1_width_16k_l0_small"],
)
def test_where_no_name_says_it_the_recipe_must(tmp_path: Path, path: str) -> None:
    files = scope(tmp_path, path)
    with pytest.raises(SAEError, match=r"its folders name layer 1 only.*give `hook_point`"):
        resolve_layer(files, None, "x")
    assert files.hook_point is None
    assert resolve_layer(files, RESIDUAL, "x") == (1, RESIDUAL)
    with pytest.raises(SAEError, match=r"sits at layer 1, as its folders say, the recipe says"):
        resolve_layer(files, "blocks.2.hook_resid_post", "x")


@pytest.mark.parametrize("path", OTHER_PLACES)
def test_a_release_of_another_place_is_refused_by_name(tmp_path: Path, path: str) -> None:
    folder = tmp_path / path
    layout = "gemma_2" if "width_16k/" in path else "gemma_3"
    save = save_gemma_scope if layout == "gemma_2" else save_gemma_scope_2
    save(folder, tiny_sae())
    repo, _, inside = (
        path.replace("models--google--", "").replace("snapshots/0f/", "").partition("/")
    )
    files = LAYOUTS[layout].read(folder, Release(f"google/{repo}", inside, None))
    with pytest.raises(SAEError, match="not supported"):
        resolve_layer(files, None, "x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hf_hook_point_in": "model.layers.1.self_attn.o_proj.input"}, "not supported"),
        ({"hf_hook_point_in": "model.layers.1.post_feedforward_layernorm.output"}, "not supported"),
        ({"hf_hook_point_in": ["model.layers.1.output"]}, "not supported"),
        (
            {
                "hf_hook_point_in": "model.layers.1.output",
                "hf_hook_point_out": "model.layers.2.output",
            },
            "expected jump_relu that writes where it reads",
        ),
        ({"architecture": "topk"}, "architecture is 'topk'"),
        ([], "is no JSON object"),
    ],
)
def test_gemma_scope_2_states_its_place_itself(
    tmp_path: Path, config: object, message: str
) -> None:
    folder = save_gemma_scope_2(tmp_path / "resid_post" / "layer_1_width_16k_l0_small", tiny_sae())
    assert resolve_layer(open_sae_folder(folder), None, "x") == (1, RESIDUAL)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SAEError, match=message):
        resolve_layer(open_sae_folder(folder), None, "x")
