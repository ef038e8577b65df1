"""Base model folders: what is read from them, and how a broken one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bake.base import find_base, open_base
from bake.errors import ModelError
from bake.recipe import Recipe
from tests.worlds import D_IN, FAMILIES, N_LAYERS, RecipeWriter, cut, tiny_base


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_come_from_the_tensors(tmp_path: Path, family: str) -> None:
    folder = tiny_base(tmp_path / "base", family, shards=3)
    base = open_base(folder, name="base", revision=None)
    assert (base.d_in, base.n_layers, base.bos_token_id) == (D_IN, N_LAYERS, 2)
    assert base.layer_prefix.endswith("layers.") and "vision" not in base.layer_prefix
    assert len(base.shards) > 1
    assert all((folder / shard).is_file() for shard in base.shards)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (edit_config(model_type="llama"), "model_type is 'llama'; expected one of gemma"),
        (
            edit_config(architectures=["Gemma2ForSequenceClassification"]),
            "expected Gemma2ForCausal",
        ),
        (edit_config(sae_clamp={}), "is a clamped checkpoint already"),
        (lambda f: first_shard(f).unlink(), "shard .* is missing"),
        (lambda f: cut(first_shard(f), 3000), "shard .* is damaged"),
        (lambda f: cut(first_shard(f), 4), "shard .* is damaged"),
        (edit_index(lambda m: m.update(dict.fromkeys(m, "../x"))), "points outside the folder"),
        (edit_index(lambda m: m.update(ghost=next(iter(m.values())))), "ghost is not in"),
        (
            edit_index(lambda m: m.update({min(m): next(s for s in m.values() if s != m[min(m)])})),
            "is not in model-.*, where the index places it",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            "holds no weight_map",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "expected safetensors weights",
        ),
    ],
)
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], None], match: str) -> None:
    folder = tiny_base(tmp_path / "base", shards=3)
    damage(folder)
    with pytest.raises(ModelError, match=match):
        open_base(folder, name="base", revision=None)


def test_names_that_lead_nowhere(tmp_path: Path, write_recipe: RecipeWriter) -> None:
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [1]}
    for model, match in (
        ("./absent", "no such folder"),
        ("no-owner", "no such folder"),
        ("owner/absent", "cannot be downloaded"),
    ):
        with pytest.raises(ModelError, match=match):
            find_base(Recipe.load(write_recipe(clamp, base={"model": model})))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        find_base(Recipe.load(write_recipe(clamp, base={"model": "empty"})))
