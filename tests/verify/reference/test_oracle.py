"""The oracle against loops in float64, and the identities that any clamp must satisfy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bake.errors import SAEError
from bake.recipe import Clamp, Recipe
from bake.stock import decoder_layers, load_base
from tests.clamps import (
    ORACLE_TABLES,
    SAE_KINDS,
    random_residual,
    save_sae_of_kind,
    sites_of_tables,
)
from tests.worlds import (
    D_IN,
    D_SAE,
    KINDS,
    TinySAE,
    sae_table,
    save_sae_lens,
    tiny_base,
    tiny_sae,
)
from verify.reference.editing import edit_code
from verify.reference.oracle import Oracle, edit_residual, reconstruct_residual
from verify.reference.whole_sae import Site, load_sites


def encode_by_hand(kind: str, folder: Path, x: np.ndarray) -> np.ndarray:
    """Feature activations of one token, feature by feature: [d_in] -> [d_sae], float64."""
    sae: TinySAE = tiny_sae(3)
    W = sae.W_enc.astype(np.float64)
    shifted = x if "scope" in kind or "no b_dec" in kind else x - sae.b_dec
    gates = load_file(folder / "sae_weights.safetensors") if kind == "gated" else {}
    acts = np.zeros(D_SAE)
    for i in range(D_SAE):
        projected = sum(shifted[d] * W[d, i] for d in range(D_IN))
        if kind == "gated":
            magnitude = projected * np.exp(float(gates["r_mag"][i])) + float(gates["b_mag"][i])
            acts[i] = max(magnitude, 0.0) if projected + float(gates["b_gate"][i]) > 0 else 0.0
        else:
            pre = projected + float(sae.b_enc[i])
            threshold = 0.0 if kind in ("standard", "topk") else float(sae.threshold[i])
            acts[i] = max(pre, 0.0) if pre > threshold else 0.0
    if kind == "topk":  # the six largest of `save_sae_lens`
        for i in np.argsort(-acts, kind="stable")[6:]:
            acts[i] = 0.0
    return acts


def edit_by_hand(acts: np.ndarray, table: dict[str, Any]) -> np.ndarray:
    """What ORACLE_TABLES' one equation makes of a code, target by target: [d_sae] -> [d_sae]."""
    trigger, features = table.get("trigger", 0.0), table["features"]
    edited = acts.copy()
    if table["method"] == "random_decoder":
        for f in features:
            if acts[f] > trigger:
                edited[(f + 1) % D_SAE] = table["value"]
        return edited
    if table["method"] == "dynamic":
        if any(acts[f] > trigger for f in features):
            edited[features] = table["value"]
        return edited
    for f in features:
        if not acts[f] > trigger:
            continue
        if table["method"] == "clamp":
            edited[f] = table["value"]
        elif table["method"] == "zero":
            edited[f] = 0.0
        elif table["method"] == "scale":
            edited[f] = (1 - table["multiplier"]) * acts[f]
        elif table.get("also_clamp"):
            edited[f] = table.get("clamp_value", table["value"])
    if table["method"] == "refusal" and any(acts[f] > trigger for f in features):
        edited[table["refusal_feature"]] = table["value"]
    return edited


def edited_and_changed(
    h: torch.Tensor, site: Site, exempt: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    nowhere = torch.zeros(h.shape[:-1], dtype=torch.bool)
    found = edit_residual(h, site, nowhere if exempt is None else exempt)
    return found.h, found.changed


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("method", ORACLE_TABLES)
def test_residual_is_that_of_the_loops(
    kind: str, method: str, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    folder = save_sae_of_kind(kind, tmp_path)
    table = {**sae_table("layer_1/sae"), **ORACLE_TABLES[method]}
    (site,) = sites_of_tables(write_recipe, table)
    h = random_residual()
    out, changed = edited_and_changed(h, site)
    W_dec = tiny_sae(3).W_dec.astype(np.float64)
    fired = 0
    for t in range(h.shape[1]):
        x = h[0, t].numpy().astype(np.float64)
        acts = encode_by_hand(kind, folder, x)
        edited = edit_by_hand(acts, table)
        expected = x + sum((edited[i] - acts[i]) * W_dec[i] for i in range(D_SAE))
        np.testing.assert_allclose(out[0, t].numpy(), expected, rtol=0, atol=2e-5)
        assert bool(changed[0, t]) == bool((edited != acts).any())
        fired += int((edited != acts).any())
    assert site.layer == 1
    assert 0 < fired < h.shape[1]


def test_the_bare_reconstruction_edits_nothing_and_drops_the_error(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    save_sae_of_kind("jumprelu", tmp_path)
    (site,) = sites_of_tables(write_recipe, {**sae_table("layer_1/sae"), **ORACLE_TABLES["zero"]})
    h = random_residual()
    exempt = torch.zeros(h.shape[:-1], dtype=torch.bool)
    exempt[0, 0] = True
    found = reconstruct_residual(h, site, exempt)
    assert torch.equal(found.h[0, 0], h[0, 0])
    rest = site.sae.decode(site.sae.encode(h[0, 1:].double())).float()
    assert torch.allclose(found.h[0, 1:], rest, atol=1e-6)
    assert (found.h - h)[0, 1:].abs().amax(-1).min() > 1e-3
    assert torch.equal(found.changed, ~exempt)


def test_a_value_equal_to_the_activation_gives_h_bit_for_bit() -> None:
    class Exact:
        """An SAE whose feature i is channel i."""

        cfg = type("cfg", (), {"d_sae": D_IN})

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

        def decode(self, acts: torch.Tensor) -> torch.Tensor:
            return acts * 0.37

    h = random_residual().round()
    h[..., 5] = h[..., 5].sign() * 2
    table = {"method": "clamp", "features": [5], "value": 2.0, "sae": {"path": "sae"}}
    site = Site(1, Clamp.model_validate(table), Exact())
    assert (h[..., 5] > 0).any()
    out, changed = edited_and_changed(h, site)
    assert torch.equal(out, h)
    assert not changed.any()


def test_a_clamp_that_never_fires_gives_h_bit_for_bit(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    save_sae_of_kind("jumprelu", tmp_path)
    table = {**sae_table("layer_1/sae"), "method": "clamp", "features": [3], "value": -9.0}
    (site,) = sites_of_tables(write_recipe, {**table, "trigger": 1e6})
    for dtype in (torch.float32, torch.bfloat16):
        h = random_residual().to(dtype)
        out, changed = edited_and_changed(h, site)
        assert out.dtype == dtype
        assert torch.equal(out, h)
        assert not changed.any()


def test_only_touched_tokens_move_and_exempt_ones_do_not(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sae_of_kind("standard", tmp_path)
    table = {**sae_table("layer_1/sae"), "method": "clamp", "features": [3], "value": -9.0}
    (site,) = sites_of_tables(write_recipe, table)
    h = random_residual()
    whole, changed = edited_and_changed(h, site)
    assert torch.equal((whole != h).any(-1), changed)
    exempt = changed.clone()
    exempt[0, exempt[0].nonzero()[0]] = False
    out, moved = edited_and_changed(h, site, exempt)
    assert int(moved.sum()) == 1
    assert torch.equal(out[exempt], h[exempt])
    monkeypatch.setattr("verify.reference.oracle.CODE_BYTES", 4 * D_SAE * 7)
    in_parts, changed_in_parts = edited_and_changed(h, site)
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-5)
    assert torch.equal(changed_in_parts, changed)


def test_low_precision_rounds_once_at_the_end(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    save_sae_of_kind("jumprelu", tmp_path)
    table = {**sae_table("layer_1/sae"), "method": "clamp", "features": [3, 17], "value": -9.0}
    (site,) = sites_of_tables(write_recipe, table)
    h = random_residual().bfloat16()
    out, changed = edited_and_changed(h, site)
    exact, _ = edited_and_changed(h.float(), site)
    assert changed.any()
    assert torch.equal(out, exact.bfloat16())


def test_active_features_are_those_above_the_trigger(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    save_sae_of_kind("standard", tmp_path)
    table = {**sae_table("layer_1/sae"), "method": "refusal", "features": [17, 3]}
    table |= {"refusal_feature": 9, "value": 5.0, "trigger": 0.4}
    (site,) = sites_of_tables(write_recipe, table)
    h = random_residual().reshape(2, 20, D_IN)
    exempt = torch.zeros(2, 20, dtype=torch.bool)
    exempt[1] = True
    active = edit_residual(h, site, exempt).active
    for t in range(20):
        acts = encode_by_hand("standard", tmp_path, h[0, t].numpy().astype(np.float64))
        assert active[0, t].tolist() == [bool(acts[17] > 0.4), bool(acts[3] > 0.4)]
    assert active[0].any() and not active[1].any()


def test_value_of_random_decoder_is_gated_by_the_feature_before_it() -> None:
    table = {"method": "random_decoder", "features": [0, 1], "value": 8.0, "sae": {"path": "sae"}}
    clamp = Clamp.model_validate(table)
    acts = torch.tensor([[1.0, 0.0, 0.0, 5.0], [0.0, 2.0, 0.0, 5.0], [0.0, 0.0, 3.0, 5.0]])
    expected = torch.tensor([[1.0, 8.0, 0.0, 5.0], [0.0, 2.0, 8.0, 5.0], [0.0, 0.0, 3.0, 5.0]])
    assert torch.equal(edit_code(acts, clamp), expected)


# --------------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in KINDS}


def oracle_on(
    base: Path, tmp_path: Path, write_recipe: Callable[..., Path], *layers: int, **extra: Any
) -> Oracle:
    tables = []
    for layer in layers:
        save_sae_lens(tmp_path / f"sae{layer}", tiny_sae(layer), layer=layer)
        features = list(range(6))
        table = {"method": "clamp", "features": features, "value": -4.0, **extra}
        tables.append({"sae": {"path": f"sae{layer}"}, **table})
    recipe = Recipe.load(write_recipe(*tables, base={"model": str(base)}))
    return Oracle(load_base(recipe), load_sites(recipe))


IDS = torch.tensor([[0, 0, 2, 10, 11, 12, 40, 41], [2, 30, 31, 2, 33, 34, 35, 36]])
MASK = (IDS != 0).long()


@pytest.mark.parametrize("family", KINDS)
def test_the_next_layer_sees_the_edited_residual(
    family: str, bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    oracle = oracle_on(bases[family], tmp_path, write_recipe, 1)
    seen: list[torch.Tensor] = []
    layers = decoder_layers(oracle.model)
    hook = layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        before = oracle.model(**inputs).logits
        with oracle.applied() as model:
            edited = model(**inputs).logits
        after = oracle.model(**inputs).logits
    hook.remove()
    assert torch.equal(before, after)
    assert not torch.equal(before, edited)
    base_h, reference_h, _ = (h.numpy().astype(np.float64) for h in seen)
    sae = tiny_sae(1)
    fired = 0
    active = np.zeros((2, 6), dtype=bool)
    for b in range(2):
        for t in range(IDS.shape[1]):
            pre = (base_h[b, t] - sae.b_dec) @ sae.W_enc.astype(np.float64) + sae.b_enc
            acts = np.where(pre > sae.threshold, np.maximum(pre, 0), 0)
            on = acts[:6] > 0
            expected = base_h[b, t] + (np.where(on, -4.0, acts[:6]) - acts[:6]) @ sae.W_dec[:6]
            if IDS[b, t] == 2:
                assert np.array_equal(reference_h[b, t], base_h[b, t])
                continue
            scale = np.abs(base_h[b, t]).max()
            np.testing.assert_allclose(reference_h[b, t], expected, rtol=0, atol=1e-5 * scale)
            if MASK[b, t] == 1:
                fired += int(on.any())
                active[b] |= on
    assert fired > 0
    assert oracle.tokens_fired == fired
    assert oracle.fired_by_layer == {1: fired}
    assert np.array_equal(oracle.last_active[1].numpy(), active)


def test_a_feature_that_is_active_in_padding_only_is_not_active(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    oracle = oracle_on(bases["gemma2"], tmp_path, write_recipe, 1)
    ids = torch.tensor([[20, 21, 22, 23, 24, 2]])
    for mask, active in (([1, 1, 1, 1, 1, 1], True), ([0, 0, 0, 0, 0, 1], False)):
        with torch.no_grad(), oracle.applied() as model:
            model(input_ids=ids, attention_mask=torch.tensor([mask]))
        assert bool(oracle.last_active[1].any()) is active


def test_bos_is_clamped_where_it_is_not_exempt(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    bos_only = {"input_ids": torch.tensor([[2]]), "attention_mask": torch.tensor([[1]])}
    fired = {}
    for exempt in (True, False):
        oracle = oracle_on(bases["gemma2"], tmp_path, write_recipe, 0, 1, exempt_bos=exempt)
        with torch.no_grad(), oracle.applied() as model:
            model(**bos_only)
        fired[exempt] = oracle.tokens_fired
    assert fired == {True: 0, False: 1}


def test_a_token_on_which_two_clamps_fire_counts_once(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    oracle = oracle_on(bases["gemma2"], tmp_path, write_recipe, 0, 2)
    with torch.no_grad(), oracle.applied() as model:
        model(input_ids=IDS, attention_mask=MASK)
    by_layer = oracle.fired_by_layer
    assert min(by_layer.values()) > 0
    assert max(by_layer.values()) <= oracle.tokens_fired < sum(by_layer.values())


def test_bos_is_exempt_by_id_in_every_step_of_generation(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    oracle = oracle_on(bases["gemma2"], tmp_path, write_recipe, 1)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), oracle.applied() as model:
        cached = model.generate(IDS, attention_mask=MASK, use_cache=True, **arguments)
        plain = model.generate(IDS, attention_mask=MASK, use_cache=False, **arguments)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("layer", "d_in", "message"), [(7, D_IN, "model has 4 layers"), (1, 16, "hidden size is 32")]
)
def test_an_sae_of_another_model_is_refused(
    layer: int,
    d_in: int,
    message: str,
    bases: dict[str, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    save_sae_lens(tmp_path / "sae", tiny_sae(d_in=d_in), layer=layer)
    table = {"sae": {"path": "sae"}, "method": "zero", "features": [1]}
    recipe = Recipe.load(write_recipe(table, base={"model": str(bases["gemma2"])}))
    with pytest.raises(SAEError, match=message):
        Oracle(load_base(recipe), load_sites(recipe))
