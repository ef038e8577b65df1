from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bake.recipe import Recipe
from bake.stock import load_base
from bakeout.gemma.slicing import write_slice
from tests.engines import material_of
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.engines.runners import HookedRunner
from verify.evidence.controls import all_controls, measure_controls
from verify.journal import Journal
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites

FEATURES, BESIDE = [30, 1, 9], [4, 28, 0]


@pytest.fixture
def world(tmp_path: Path, write_recipe: Callable[..., Path]) -> dict[str, Recipe]:
    tiny_tokenizer(tiny_base(tmp_path / "base"))
    save_sae_lens(tmp_path / "sae", tiny_sae())
    numbers = write_slice(tmp_path / "sae", tmp_path / "slice", FEATURES, BESIDE)
    assert numbers == [0, 2, 4]
    table = {"method": "clamp", "value": -6.0, "trigger": 0.1}
    return {
        "whole": Recipe.load(write_recipe({"sae": {"path": "sae"}, "features": FEATURES} | table)),
        "slice": Recipe.load(write_recipe({"sae": {"path": "slice"}, "features": numbers} | table)),
    }


def test_a_slice_clamps_as_the_whole_does(world: dict[str, Recipe], tmp_path: Path) -> None:
    config = json.loads((tmp_path / "slice/cfg.json").read_text())
    assert config["d_sae"] == 6
    assert config["metadata"]["slice_of"] == len(tiny_sae().b_enc)
    assert config["metadata"]["features"] == [30, 4, 1, 28, 9, 0]
    model = load_base(world["whole"])
    ids = torch.randint(6, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, recipe in world.items():
        oracle = Oracle(model, load_sites(recipe))
        found[name] = HookedRunner(name, model, oracle).logits(ids, torch.ones_like(ids))
        assert oracle.tokens_fired > 0
    torch.testing.assert_close(found["slice"], found["whole"], rtol=0, atol=1e-5)


def test_nothing_is_reconstructed_from_a_slice(world: dict[str, Recipe]) -> None:
    names = {}
    for name, recipe in world.items():
        model, sites = load_base(recipe), load_sites(recipe)
        assert all(site.reconstructs is (name == "whole") for site in sites)
        material = material_of(recipe)
        oracles = all_controls(model, sites, material, "chat", journal := Journal())
        found = measure_controls(model, oracles, material, "chat", journal, lambda *_: None)
        names[name] = [control.name for control in found]
    assert names["whole"] == ["reconstruction", "zero", "random_decoder", "random_features"]
    assert names["slice"] == ["zero", "random_decoder", "random_features"]


def test_pairs_must_be_pairs(tmp_path: Path) -> None:
    save_sae_lens(tmp_path / "sae", tiny_sae())
    for features, beside in (([1, 2], [3]), ([1, 2], [2, 3])):
        with pytest.raises(ValueError, match="expected as many"):
            write_slice(tmp_path / "sae", tmp_path / "out", features, beside)
