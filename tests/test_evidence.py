"""Engines side by side: exact checkpoints of every method and family, and planted defects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    save_sae_lens,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    write_questions,
    write_texts,
)

from bake.recipe import QuestionSource, Recipe, TextSource
from bake.rounding import BAR, epsilon_of
from export.checkpoint import plan_checkpoint, write_checkpoint
from verify.choices import letter_tokens
from verify.comparison import Comparison, compare
from verify.firing import FeatureWatch, FiredExamples
from verify.journal import Journal
from verify.material import Material
from verify.prompts import text_prompts
from verify.questions import load_questions, load_texts
from verify.reference import Oracle
from verify.report import EngineReport
from verify.runners import HookedRunner, Runner
from verify.sensitivity import Sensitivity
from verify.stock import load_base, load_tokenizer
from verify.tolerances import parity_failures
from verify.whole_sae import load_sites

KINDS = frozenset({"parity", "choices", "loss"})
METHODS: dict[str, dict[str, Any]] = {
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
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {f: tiny_tokenizer(tiny_base(folder / f, f)) for f in FAMILIES}


def material_of(recipe: Recipe, n: int = 3) -> Material:
    """A few questions and texts for a recipe's model."""
    forget = write_questions(recipe.local("forget.jsonl"), n, seed=1)
    retain = write_questions(recipe.local("retain.jsonl"), n, seed=2)
    text = write_texts(recipe.local("text.jsonl"), n)
    tokenizer = load_tokenizer(recipe)
    windows = text_prompts(load_texts(TextSource(path=text.name), recipe), tokenizer)
    questions = {
        name: load_questions(QuestionSource(path=path.name), recipe)
        for name, path in (("forget", forget), ("retain", retain))
    }
    return Material(questions, windows, letter_tokens(tokenizer), tokenizer)


def recipe_of(
    write_recipe: Callable[..., Path], folder: Path, base: Path, layers: list[int], method: str
) -> Recipe:
    tables = []
    for layer in layers:
        save_sae_lens(folder / f"sae{layer}", tiny_sae(layer), layer=layer)
        table = {"method": method.split()[0], "features": [1, 2, 9, 30], **METHODS[method]}
        tables.append({"sae": {"path": f"sae{layer}"}, **table})
    return Recipe.load(write_recipe(*tables, base={"model": str(base)}))


def run(oracle: Oracle, checkpoint: Runner, recipe: Recipe) -> dict[str, EngineReport]:
    here: list[Runner] = [
        HookedRunner("base", oracle.model),
        HookedRunner("reference", oracle.model, oracle),
        checkpoint,
    ]
    found = compared(oracle, here, recipe)
    return {engine.name: engine for engine in found.reports(KINDS, "chat", {})}


def compared(oracle: Oracle, here: list[Runner], recipe: Recipe, parity: bool = True) -> Comparison:
    material = material_of(recipe)
    prompts = material.prompts(KINDS)
    epsilon = epsilon_of(oracle.model.dtype)
    sensitivity = Sensitivity("reference", oracle, epsilon, material, Journal(), prompts)
    found = Comparison(
        material,
        prompts,
        tuple(runner.name for runner in here),
        parity,
        {},
        FiredExamples("chat"),
        FeatureWatch({site.layer: site.features for site in oracle.sites}),
        {runner.name: sensitivity for runner in here},
    )
    compare(here, [], {"reference": oracle}, found, Journal(), lambda *_: None)
    return found


def load_clamped(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_agrees_with_the_oracle(
    family: str,
    method: str,
    bases: dict[str, Path],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    layers = [0, 2] if METHODS[method].get("trigger") is None else [1]
    recipe = recipe_of(write_recipe, tmp_path, bases[family], layers, method)
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "out", card="# card\n")
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    checkpoint = HookedRunner("checkpoint", load_clamped(tmp_path / "out"))
    engines = run(oracle, checkpoint, recipe)
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
    recipe = recipe_of(write_recipe, tmp_path, bases["gemma2"], [1], "clamp")
    return Oracle(load_base(recipe), load_sites(recipe)), recipe


class Defective:
    """The reference, but for `error` on one logit of one token of every batch."""

    def __init__(self, oracle: Oracle, error: float) -> None:
        self.name = "checkpoint"
        self.error = error
        self.inner = HookedRunner("inner", oracle.model, oracle)

    def logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, last_only: bool
    ) -> torch.Tensor:
        logits = self.inner.logits(input_ids, attention_mask, last_only).clone()
        logits[0, -1, 17] += self.error
        return logits

    def close(self) -> None:
        self.inner.close()


def test_logits_off_by_a_thousandth_are_caught(oracle_and_recipe: tuple[Oracle, Recipe]) -> None:
    oracle, recipe = oracle_and_recipe
    for error, failures in ((0.0, []), (1e-3, ["max_abs_logit"])):
        parity = run(oracle, Defective(oracle, error), recipe)["checkpoint"].parity
        assert parity is not None
        assert [f.what for f in parity_failures("checkpoint", parity, 12)] == failures
        assert parity.max_abs_logit == pytest.approx(error, abs=1e-6)


def test_an_engine_that_is_the_base_is_far_from_the_reference(
    oracle_and_recipe: tuple[Oracle, Recipe],
) -> None:
    oracle, recipe = oracle_and_recipe
    engines = run(oracle, HookedRunner("checkpoint", oracle.model), recipe)
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
    found = compared(oracle, [reference], recipe, parity=False)
    assert list(found.watch.never_active()) == [(1, 9), (1, 30)]
