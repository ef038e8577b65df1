"""Engines side by side: exact checkpoints of every method and family, and planted defects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bake.recipe import Recipe
from bake.rounding import BAR
from bake.stock import load_base
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.clamps import METHOD_NUMBERS, recipe_on_layers
from tests.engines import compared_with, load_clamped, reports_beside
from tests.worlds import KINDS, save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.engines.runners import HookedRunner, Reading
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.tolerances import parity_failures


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {f: tiny_tokenizer(tiny_base(folder / f, f)) for f in KINDS}


@pytest.mark.parametrize("method", METHOD_NUMBERS)
@pytest.mark.parametrize("family", KINDS)
def test_checkpoint_agrees_with_the_oracle(
    family: str,
    method: str,
    bases: dict[str, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    layers = [0, 2] if METHOD_NUMBERS[method].get("trigger") is None else [1]
    recipe = recipe_on_layers(write_recipe, tmp_path, bases[family], layers, method)
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "out", card="# card\n")
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    checkpoint = HookedRunner("checkpoint", load_clamped(tmp_path / "out"))
    engines = reports_beside(oracle, checkpoint, recipe)
    assert min(oracle.fired_by_layer.values()) > 0
    found, base = engines["checkpoint"].parity, engines["base"].parity
    assert found is not None and base is not None
    assert list(parity_failures("checkpoint", found, 12)) == []
    assert found.rounding is not None and base.rounding is not None
    assert found.tokens_fired > 0 and found.rounding.tokens_fired > 0
    assert found.rounding.worst <= BAR / 2 and base.rounding.worst > 100 * BAR
    assert engines["checkpoint"].loss_added == pytest.approx(
        engines["reference"].loss_added, abs=1e-5
    )


@pytest.fixture
def oracle_and_recipe(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> tuple[Oracle, Recipe]:
    recipe = recipe_on_layers(write_recipe, tmp_path, bases["gemma2"], [1], "clamp")
    return Oracle(load_base(recipe), load_sites(recipe)), recipe


class Defective(HookedRunner):
    """The reference, but for `error` on one logit of one token of every batch."""

    def __init__(self, oracle: Oracle, error: float) -> None:
        super().__init__("checkpoint", oracle.model, oracle)
        self.error = error

    def read(self, ids: Any, mask: Any, wanted: Any, scored: Any) -> Reading:
        found = super().read(ids, mask, wanted, scored)
        logits = found.logits.clone()
        logits[int(wanted[0].sum()) - 1, 17] += self.error  # the first prompt's end
        return replace(found, logits=logits)


def test_logits_off_by_a_thousandth_are_caught(oracle_and_recipe: tuple[Oracle, Recipe]) -> None:
    oracle, recipe = oracle_and_recipe
    for error, failures in ((0.0, []), (1e-3, ["max_abs_logit"])):
        parity = reports_beside(oracle, Defective(oracle, error), recipe)["checkpoint"].parity
        assert parity is not None
        assert [f.what for f in parity_failures("checkpoint", parity, 12)] == failures
        assert parity.max_abs_logit == pytest.approx(error, abs=1e-6)


def test_an_engine_that_is_the_base_is_far_from_the_reference(
    oracle_and_recipe: tuple[Oracle, Recipe],
) -> None:
    oracle, recipe = oracle_and_recipe
    engines = reports_beside(oracle, HookedRunner("checkpoint", oracle.model), recipe)
    assert engines["checkpoint"].forget == engines["base"].forget
    assert engines["checkpoint"].loss_added == 0.0
    same, moved = (engines[name].loss_detail for name in ("checkpoint", "reference"))
    assert same is not None and moved is not None
    assert same.interval == (0.0, 0.0) and same.split.whole.max_abs == 0
    assert moved.interval is not None and engines["reference"].loss_added is not None
    assert moved.interval.low < engines["reference"].loss_added < moved.interval.high
    assert moved.split.whole.mean == pytest.approx(engines["reference"].loss_added, abs=1e-9)
    assert engines["reference"].loss_added != 0.0
    parity = engines["checkpoint"].parity
    assert parity is not None
    assert parity == replace(engines["base"].parity, tokens_fired=parity.tokens_fired)  # type: ignore[type-var]
    assert list(parity_failures("checkpoint", parity, 12))


def test_features_that_were_never_active_are_named(
    bases: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    sae = tiny_sae()
    sae.threshold[[9, 30]] = 1e6
    save_sae_lens(tmp_path / "sae", sae)
    table = {"sae": {"path": "sae"}, "method": "zero", "features": [1, 9, 2, 30]}
    recipe = Recipe.load(write_recipe(table, base={"model": str(bases["gemma2"])}))
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    reference = HookedRunner("reference", oracle.model, oracle)
    found = compared_with(oracle, [reference], recipe, parity=False)
    assert list(found.watch.never_active()) == [(1, 9), (1, 30)]
