"""Clamp tables of every method, and SAEs of every kind to clamp in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bake.recipe import Recipe
from tests.worlds import D_IN, D_SAE, save_gemma_scope, save_gemma_scope_2, save_sae_lens, tiny_sae
from verify.reference.whole_sae import Site, load_sites

METHOD_TABLES: dict[str, dict[str, Any]] = {
    "clamp": {"method": "clamp", "value": -6.0},
    "conditional clamp": {"method": "clamp", "value": -6.0, "trigger": 0.7},
    "zero": {"method": "zero"},
    "scale": {"method": "scale", "multiplier": 8.0},
    "refusal": {"method": "refusal", "refusal_feature": 30, "value": -8.0, "trigger": 0.2},
    "refusal and clamp": {
        "method": "refusal",
        "refusal_feature": 30,
        "value": -8.0,
        "also_clamp": True,
        "clamp_value": -3.0,
    },
    "random decoder": {"method": "random_decoder", "value": -6.0},
    "dynamic": {"method": "dynamic", "value": -6.0, "trigger": 4.0, "tau": 0.3},
}
"""Every method, without features."""
OF_ONE_TOKEN = {name: table for name, table in METHOD_TABLES.items() if name != "dynamic"}
"""Those that ask nothing of what came before, which stock layers can carry."""
METHOD_FEATURES = [1, 2, 5, 9, 20, 63]
METHOD_NUMBERS: dict[str, dict[str, Any]] = {
    "clamp": {"value": -6.0},
    "clamp with a trigger": {"value": -6.0, "trigger": 0.5},
    "zero": {},
    "scale": {"multiplier": 2.5},
    "refusal": {"refusal_feature": 40, "value": 8.0},
    "refusal with also_clamp": {
        "refusal_feature": 40,
        "value": 8.0,
        "also_clamp": True,
        "clamp_value": -3.0,
        "exempt_bos": False,
    },
    "random_decoder": {"value": -6.0},
    "dynamic": {"value": -3.0, "tau": 0.2},
}
"""Numbers of every method; a name begins with its method."""
ORACLE_TABLES: dict[str, dict[str, Any]] = {
    "clamp": {"method": "clamp", "features": [3, 17, 40], "value": -7.5},
    "clamp, trigger": {"method": "clamp", "features": [3, 17], "value": -7.5, "trigger": 0.6},
    "zero": {"method": "zero", "features": [3, 17], "trigger": 0.2},
    "scale": {"method": "scale", "features": [3, 17], "multiplier": 3.0, "trigger": 0.2},
    "refusal": {"method": "refusal", "features": [3, 17], "refusal_feature": 9, "value": 6.0},
    "refusal, also": {
        "method": "refusal",
        "features": [3, 17],
        "refusal_feature": 9,
        "value": 6.0,
        "trigger": 0.3,
        "also_clamp": True,
        "clamp_value": -2.0,
    },
    "refusal, also by default": {
        "method": "refusal",
        "features": [3, 17],
        "refusal_feature": 9,
        "value": -6.0,
        "also_clamp": True,
    },
    "random_decoder": {"method": "random_decoder", "features": [3, 4, D_SAE - 1], "value": -5.0},
    "dynamic": {"method": "dynamic", "features": [3, 17, 40], "value": -5.0, "tau": 0.1},
}
"""Every method with features, some of them with a trigger."""
SAE_KINDS = (
    "standard",
    "jumprelu",
    "jumprelu, no b_dec",
    "gated",
    "topk",
    "gemma scope",
    "gemma scope 2",
)


def recipe_on_layers(
    write_recipe: Callable[..., Path], folder: Path, base: Path, layers: list[int], method: str
) -> Recipe:
    """A recipe that clamps the same features at each of the layers."""
    tables = []
    for layer in layers:
        save_sae_lens(folder / f"sae{layer}", tiny_sae(layer), layer=layer)
        table = {"method": method.split()[0], "features": [1, 2, 9, 30], **METHOD_NUMBERS[method]}
        tables.append({"sae": {"path": f"sae{layer}"}, **table})
    verify = {
        "forget_questions": {"path": "forget.jsonl"},
        "retain_questions": {"path": "retain.jsonl"},
        "text": {"path": "text.jsonl"},
    }
    return Recipe.load(write_recipe(*tables, base={"model": str(base)}, verify=verify))


def save_sae_of_kind(kind: str, folder: Path) -> Path:
    """A random SAE of a kind, under a path that names layer 1."""
    sae, folder = tiny_sae(3), folder / "layer_1" / "sae"
    if kind == "gemma scope":
        return save_gemma_scope(folder, sae)
    if kind == "gemma scope 2":
        return save_gemma_scope_2(folder, sae)
    architecture, _, without = kind.partition(", ")
    return save_sae_lens(folder, sae, architecture=architecture, apply_b_dec_to_input=not without)


def sites_of_tables(write_recipe: Callable[..., Path], *tables: dict[str, Any]) -> list[Site]:
    """The reference's sites of a recipe with these clamp tables."""
    return load_sites(Recipe.load(write_recipe(*tables)))


def random_residual(seed: int = 0, tokens: int = 40) -> torch.Tensor:
    """[1, tokens, d_in] float32."""
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((1, tokens, D_IN)).astype(np.float32)
    )
