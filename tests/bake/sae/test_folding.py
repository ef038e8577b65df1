"""SAE slices against sae_lens's own encode, and every way an SAE can be unusable."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.numpy import load_file, save_file

from bake.errors import SAEError
from bake.recipe import Recipe
from bake.sae import array_file as arrays
from bake.sae.folding import SAESlice, load_slice
from bake.sae.layouts import find_sae, resolve_layer
from bake.sae.lens_config import REASONS
from bake.sources import SAESource
from tests.worlds import (
    D_IN,
    D_SAE,
    TinySAE,
    cut,
    save_gemma_scope,
    save_gemma_scope_2,
    save_sae_lens,
    tiny_sae,
)

FEATURES = [40, 3, 17, 63, 0]


def find(tmp_path: Path, name: str):
    recipe = Recipe.parse(
        {
            "schema": 1,
            "base": {"model": "m"},
            "clamp": [{"sae": {"path": name}, "method": "zero", "features": [0]}],
        },
        name="r",
        folder=tmp_path,
    )
    return find_sae(SAESource(path=name), recipe)


def acts(piece: SAESlice, x: np.ndarray) -> np.ndarray:
    pre = x @ piece.W_enc.astype(np.float64) + piece.b_enc
    return np.where(pre > piece.theta, np.maximum(pre, 0), 0)


def inputs() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((200, D_IN)) * 1.5


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_slice_equals_sae_lens_encode(tmp_path: Path, architecture: str, apply_b_dec: bool) -> None:
    save_sae_lens(
        tmp_path / "sae", tiny_sae(), architecture=architecture, apply_b_dec_to_input=apply_b_dec
    )
    piece = load_slice(find(tmp_path, "sae"), FEATURES)
    whole = SAE.load_from_disk(tmp_path / "sae", dtype="float64")
    x = inputs()
    expected = whole.encode(torch.tensor(x)).detach().numpy()[:, FEATURES]
    assert (expected > 0).any(0).all()
    assert np.abs(acts(piece, x) - expected).max() < 1e-5
    assert np.array_equal(piece.W_dec, whole.W_dec.detach().numpy()[FEATURES].astype("f4"))


@pytest.mark.parametrize("layout", ["npz", "npz compressed", "npz fortran", "scope 2"])
def test_gemma_scope_slices_equal_plain_arithmetic(tmp_path: Path, layout: str) -> None:
    sae = tiny_sae()
    folder = tmp_path / "gemma-scope-tiny-res" / "layer_3" / "width_16k"
    if layout == "scope 2":
        save_gemma_scope_2(folder, sae)
    else:
        save_gemma_scope(folder, sae)
    if layout == "npz compressed":
        np.savez_compressed(folder / "params.npz", **vars(sae))
    if layout == "npz fortran":
        np.savez(folder / "params.npz", **{n: np.asfortranarray(a) for n, a in vars(sae).items()})
    files = find(tmp_path, "gemma-scope-tiny-res/layer_3/width_16k")
    piece = load_slice(files, FEATURES)
    x = inputs()
    pre = x @ sae.W_enc[:, FEATURES].astype(np.float64) + sae.b_enc[FEATURES]
    expected = np.maximum(pre, 0) * (pre > sae.threshold[FEATURES])
    assert np.abs(acts(piece, x) - expected).max() < 1e-5
    assert np.array_equal(piece.W_dec, sae.W_dec[FEATURES])
    layer = 1 if layout == "scope 2" else 3  # Gemma Scope 2 states it, Gemma Scope's path does
    assert resolve_layer(files, None, "x") == (layer, f"blocks.{layer}.hook_resid_post")


def test_bfloat16_and_float16_weights_are_read_as_they_are(tmp_path: Path) -> None:
    sae = tiny_sae()
    for dtype in (torch.bfloat16, torch.float16):
        folder = save_sae_lens(tmp_path / str(dtype), sae)
        from safetensors.torch import save_file as save_torch

        tensors = {
            k: torch.tensor(v).to(dtype)
            for k, v in load_file(folder / "sae_weights.safetensors").items()
        }
        save_torch(tensors, folder / "sae_weights.safetensors")
        piece = load_slice(find(tmp_path, str(dtype)), FEATURES)
        assert np.array_equal(piece.W_dec, tensors["W_dec"].float().numpy()[FEATURES])


def test_blocks_smaller_than_the_array_give_the_same_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sae_lens(tmp_path / "sae", tiny_sae())
    save_gemma_scope(tmp_path / "layer_1", tiny_sae())
    for name in ("sae", "layer_1"):
        at_once = load_slice(find(tmp_path, name), FEATURES)
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "BLOCK_BYTES", 5 * D_SAE * 4)
            in_blocks = load_slice(find(tmp_path, name), FEATURES)
        assert np.array_equal(at_once.W_enc, in_blocks.W_enc)
        assert np.array_equal(at_once.W_dec, in_blocks.W_dec)


def test_older_sae_lens_config_is_understood(tmp_path: Path) -> None:
    folder = save_sae_lens(tmp_path / "sae", tiny_sae(), architecture="standard")
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "hook_point": "blocks.2.hook_resid_pre",
        "activation_fn_str": "relu",
        "normalize_activations": False,
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    files = find(tmp_path, "sae")
    assert files.architecture == "standard" and files.apply_b_dec_to_input
    assert resolve_layer(files, None, "x") == (1, "blocks.2.hook_resid_pre")


def test_norm_scaling_factor_is_folded(tmp_path: Path) -> None:
    from bake.sae.layouts import LAYOUTS, Release

    folder = save_sae_lens(
        tmp_path / "sae",
        tiny_sae(),
        architecture="standard",
        normalize_activations="expected_average_only_in",
    )
    release = Release("owner/saes", "sae", norm_scaling_factor=0.2138)
    piece = load_slice(LAYOUTS["sae_lens"].read(folder, release), FEATURES)
    whole = SAE.load_from_disk(folder, dtype="float64")
    whole.fold_activation_norm_scaling_factor(0.2138)
    x = inputs() * 5
    expected = whole.encode(torch.tensor(x)).detach().numpy()[:, FEATURES]
    assert np.abs(acts(piece, x) - expected).max() < 1e-5
    assert np.abs(piece.W_dec - whole.W_dec.detach().numpy()[FEATURES]).max() < 1e-6


@pytest.mark.parametrize("architecture", REASONS)
def test_architectures_that_cannot_be_pruned_are_refused_with_the_reason(
    tmp_path: Path, architecture: str
) -> None:
    folder = save_sae_lens(tmp_path / "sae", tiny_sae(), architecture="standard")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "architecture": architecture, "k": 5}))
    with pytest.raises(SAEError, match=f"architecture {architecture} cannot be cut down") as caught:
        find(tmp_path, "sae")
    assert REASONS[architecture] in str(caught.value)
    assert ("transcoder" in architecture) == (
        "reads one place and writes another" in REASONS[architecture]
    )


@pytest.mark.parametrize(
    ("normalisation", "advice"),
    [
        ("layer_norm", "no weights can; take an SAE that was trained without"),
        ("constant_norm_rescale", "no weights can; take an SAE that was trained without"),
        ("expected_average_only_in", "with sae_lens's fold_activation_norm_scaling_factor"),
        ("covariance_whitening", "with sae_lens's fold_activation_whitening"),
    ],
)
def test_normalisation_that_is_not_folded_is_refused_with_what_can_be_done(
    tmp_path: Path, normalisation: str, advice: str
) -> None:
    save_sae_lens(tmp_path / "sae", tiny_sae(), normalize_activations=normalisation)
    with pytest.raises(SAEError, match=f"normalize_activations is {normalisation}.*{advice}"):
        find(tmp_path, "sae")
    assert not advice.startswith("with") or hasattr(SAE, advice.rpartition(" ")[2].split("'s ")[-1])


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_anywhere_is_refused_by_name(
    tmp_path: Path, name: str, bad: float
) -> None:
    sae = tiny_sae()
    getattr(sae, name).flat[-1] = bad
    save_sae_lens(tmp_path / "sae", sae)
    save_gemma_scope(tmp_path / "layer_1", sae)
    for folder in ("sae", "layer_1"):
        with pytest.raises(SAEError, match=f"{name} is not finite"):
            load_slice(find(tmp_path, folder), [0, 1])


def test_pickles_are_refused_and_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "exploded"), "w"))  # type: ignore[return-value]

    folder = tmp_path / "sae"
    folder.mkdir()
    (folder / "sae.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SAEError, match=r"sae\.pt is a pickle"):
        find(tmp_path, "sae")
    with pytest.raises(SAEError, match=r"sae\.pt is a pickle"):
        find(tmp_path, "sae/sae.pt")
    np.savez(folder / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    with pytest.raises(SAEError, match="pickled objects"):
        find(tmp_path, "sae")
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="no SAE there"):
        find(tmp_path, "absent")
    folder = save_sae_lens(tmp_path / "sae", tiny_sae())
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    cut(weights, 4000)
    with pytest.raises(SAEError, match="damaged"):
        load_slice(find(tmp_path, "sae"), [0])
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["b_enc"]["data_offsets"] = header["b_dec"]["data_offsets"]
    header["b_enc"]["shape"] = header["b_dec"]["shape"]
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(SAEError, match="damaged"):
        load_slice(find(tmp_path, "sae"), [0])
    weights.unlink()
    with pytest.raises(SAEError, match=r"sae_weights\.safetensors is missing"):
        find(tmp_path, "sae")
    npz = save_gemma_scope(tmp_path / "layer_1", tiny_sae()) / "params.npz"
    cut(npz, npz.stat().st_size // 2)
    with pytest.raises(SAEError, match="damaged"):
        load_slice(find(tmp_path, "layer_1"), [0])
    (folder / "cfg.json").write_text("{")
    save_file({"x": np.zeros(1, "f4")}, weights)
    with pytest.raises(SAEError, match="no JSON"):
        find(tmp_path, "sae")


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    sae = tiny_sae()
    sae = TinySAE(**{**vars(sae), "b_enc": sae.b_enc[:-1]})
    save_gemma_scope(tmp_path / "layer_1", sae)
    with pytest.raises(SAEError, match=r"b_enc has shape \[63\]; expected \[64\]"):
        load_slice(find(tmp_path, "layer_1"), [0])


def test_hook_points_that_disagree_or_are_not_supported(tmp_path: Path) -> None:
    save_sae_lens(tmp_path / "sae", tiny_sae(), layer=2)
    files = find(tmp_path, "sae")
    assert resolve_layer(files, "blocks.3.hook_resid_pre", "x")[0] == 2
    with pytest.raises(SAEError, match=r"sits at blocks\.2\.hook_resid_post, the recipe says"):
        resolve_layer(files, "blocks.1.hook_resid_post", "x")
    save_sae_lens(tmp_path / "mlp", tiny_sae(), hook_name="blocks.2.hook_mlp_out")
    with pytest.raises(SAEError, match=r"blocks\.2\.hook_mlp_out"):
        resolve_layer(find(tmp_path, "mlp"), None, "x")
    save_gemma_scope(tmp_path / "nowhere", tiny_sae())
    with pytest.raises(SAEError, match="states no hook point"):
        resolve_layer(find(tmp_path, "nowhere"), None, "x")


def test_releases_are_known_before_anything_is_downloaded() -> None:
    recipe = Recipe.load(Path(__file__).parents[3] / "bake/recipes/gemma-2b-harry-potter.toml")
    with pytest.raises(SAEError, match="unknown; expected a release"):
        find_sae(SAESource(release="nonsense", id="x"), recipe)
    with pytest.raises(SAEError, match=r'no id "nonsense"; expected one of blocks\.0'):
        find_sae(SAESource(release="gemma-2b-res-jb", id="nonsense"), recipe)
    with pytest.raises(SAEError, match="cannot be downloaded from jbloom/"):
        find_sae(recipe.clamp[0].sae, recipe)
