"""What one rounding does to a reference, and tokens at which two sound computations may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bake.recipe import Recipe
from bake.rounding import BAR, EPSILON
from bake.stock import decoder_layers, load_base
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.clamps import recipe_on_layers
from tests.engines import SHOWN, load_clamped, material_of, reports_beside
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.compare.sensitivity import SAMPLE_TOKENS, Sensitivity, sample
from verify.engines.runners import HookedRunner
from verify.journal import Journal
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.tolerances import parity_failures


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> Recipe:
    base = tiny_tokenizer(tiny_base(tmp_path / "gemma2", "gemma2"))
    return recipe_on_layers(write_recipe, tmp_path, base, [1], "clamp")


def test_it_is_what_a_disturbed_reference_shows(recipe: Recipe, tmp_path: Path) -> None:
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompts = material.prompts(SHOWN, compared=True)
    path = tmp_path / "journal"
    with Journal(path) as journal:
        found = Sensitivity("reference", oracle, EPSILON["float32"], material, journal, prompts[:2])
        again = Sensitivity("reference", oracle, EPSILON["float32"], material, journal, prompts[:2])
    assert (found.typical, found.mean_kl) == (again.typical, again.mean_kl)
    assert 1e-8 < found.typical <= found.largest < 1e-3 and 0 < found.mean_kl < 1e-8
    # The naive way: every layer's output by hand, one sequence at a time.
    (prompt,) = prompts[:1]
    ids = torch.tensor([prompt.ids])
    runner = HookedRunner("reference", oracle.model, oracle)
    expected = runner.logits(ids, torch.ones_like(ids), False)
    largest = torch.zeros(len(prompt.ids))
    for seed in range(32):
        signs = torch.Generator().manual_seed(1000 + seed)

        def move(_: object, __: object, output: torch.Tensor, g: torch.Generator = signs) -> object:
            to = torch.where(torch.rand(output.shape, generator=g) < 0.5, torch.inf, -torch.inf)
            return torch.nextafter(output, to)

        hooks = [layer.register_forward_hook(move) for layer in decoder_layers(oracle.model)]
        moved = runner.logits(ids, torch.ones_like(ids), False)
        for hook in hooks:
            hook.remove()
        largest = largest.maximum((moved - expected)[0].abs().amax(dim=-1))
    found.measure([prompt])
    own = torch.tensor([found.at(prompt, position) for position in range(len(prompt.ids))])
    assert (own >= found.typical).all()
    assert (own < 4 * largest.clamp(min=found.typical)).all()
    assert (largest < 4 * own).all()


def test_rounding_to_fewer_bits_moves_more(recipe: Recipe) -> None:
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompts = material.prompts(SHOWN, compared=True)[:4]
    sizes = [
        Sensitivity("reference", oracle, EPSILON[name], material, Journal(), prompts).typical
        for name in ("float32", "float16", "bfloat16")
    ]
    assert sizes[0] < 1e-3 * sizes[1] < 1e-3 * sizes[2]


def test_the_sample_is_even_and_no_larger_than_it_needs_to_be(recipe: Recipe) -> None:
    prompts = material_of(recipe, 40).prompts(SHOWN, compared=True)
    chosen = sample(prompts)
    n_tokens = sum(len(prompt.ids) for prompt in chosen)
    assert 0.5 * SAMPLE_TOKENS < n_tokens < 2 * SAMPLE_TOKENS
    assert {prompt.source for prompt in chosen} == {"forget", "retain", "text"}
    assert len(set(chosen)) == len(chosen)


def test_a_token_on_a_threshold_is_known_beforehand_and_excused(
    tmp_path: Path, write_recipe: Callable[..., Path], recipe: Recipe
) -> None:
    """The threshold is moved to where one token's pre-activation is: it may fall either way."""
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompt = next(p for p in material.prompts(SHOWN, compared=True) if p.source == "forget")
    ids = torch.tensor([prompt.ids])
    runner = HookedRunner("reference", oracle.model, oracle)
    runner.logits(ids, torch.ones_like(ids), False)
    column = len(prompt.ids) // 2
    gates = oracle.last_gates[1].margin[0]
    threshold = float(gates[column, 0]) + float(tiny_sae(1).threshold[1])
    sae = tiny_sae(1)
    sae.threshold[1] = threshold
    assert threshold > 0
    save_sae_lens(tmp_path / "sae1", sae, layer=1)
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "out", card="# card\n")
    moved = Oracle(load_base(recipe), load_sites(recipe))
    model = load_clamped(tmp_path / "out")
    # The checkpoint falls the other way: its threshold is the next number.
    clamp = model.model.layers[1].sae_clamp
    now = float(moved_gate(moved, ids, column))
    up = torch.inf if now > 0 else -torch.inf
    for _ in range(3):
        clamp.theta[0] = torch.nextafter(clamp.theta[0], torch.tensor(up))
    engines = reports_beside(moved, HookedRunner("checkpoint", model), recipe)
    parity = engines["checkpoint"].parity
    assert parity is not None and parity.rounding is not None
    assert parity.max_abs_logit > 1e-3  # it did
    assert parity.rounding.edge_tokens >= len(prompt.ids) - column
    assert parity.rounding.edge_max_abs_logit == parity.max_abs_logit
    assert parity.rounding.worst <= BAR / 2
    assert list(parity_failures("checkpoint", parity, 12)) == []


def moved_gate(oracle: Oracle, ids: torch.Tensor, column: int) -> torch.Tensor:
    HookedRunner("reference", oracle.model, oracle).logits(ids, torch.ones_like(ids), False)
    return oracle.last_gates[1].margin[0, column, 0]
