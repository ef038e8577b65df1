"""What one rounding does to a reference, and tokens at which two sound computations may differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.questions.prompts import Prompt
from bake.recipe import Recipe
from bake.rounding import BAR, DRAWS, EPSILON
from bake.stock import decoder_layers, load_base
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.clamps import recipe_on_layers
from tests.engines import SHOWN, load_clamped, material_of, reports_beside
from tests.logits import every_logit
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.compare.sensitivity import (
    FEWEST_SAMPLED,
    MOST_SAMPLED,
    SAMPLED_SHARE,
    Sensitivity,
    sample,
)
from verify.engines.runners import HookedRunner
from verify.journal import Journal
from verify.material import Material
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
    expected = every_logit(runner, ids, torch.ones_like(ids))
    largest = torch.zeros(len(prompt.ids))
    for seed in range(32):
        signs = torch.Generator().manual_seed(1000 + seed)

        def move(_: object, __: object, output: torch.Tensor, g: torch.Generator = signs) -> object:
            to = torch.where(torch.rand(output.shape, generator=g) < 0.5, torch.inf, -torch.inf)
            return torch.nextafter(output, to)

        hooks = [layer.register_forward_hook(move) for layer in decoder_layers(oracle.model)]
        moved = every_logit(runner, ids, torch.ones_like(ids))
        for hook in hooks:
            hook.remove()
        largest = largest.maximum((moved - expected)[0].abs().amax(dim=-1))
    found.measure({prompt: range(len(prompt.ids))})
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
    for n, limit in ((3, FEWEST_SAMPLED), (20, None), (40, MOST_SAMPLED)):
        prompts = material_of(recipe, n).prompts(SHOWN, compared=True)
        share = SAMPLED_SHARE * sum(len(prompt.ids) for prompt in prompts)
        assert limit is not None or FEWEST_SAMPLED < share < MOST_SAMPLED
        chosen = sample(prompts)
        n_tokens = sum(len(prompt.ids) for prompt in chosen)
        assert 0.5 < n_tokens / (limit or share) < 2
        assert {prompt.source for prompt in chosen} == {"forget", "retain", "text"}
        assert len(set(chosen)) == len(chosen)


def sensitivity_of(oracle: Oracle, material: Material, prompts: list[Prompt]) -> Sensitivity:
    return Sensitivity("reference", oracle, EPSILON["float32"], material, Journal(), prompts)


class Watched:
    """How many tokens' logits are formed of how long sequences."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.formed = self.read = 0
        logits = HookedRunner.logits

        def watched(of: HookedRunner, ids: torch.Tensor, mask: torch.Tensor, wanted: Any) -> Any:
            self.formed, self.read = self.formed + int(wanted.sum()), self.read + int(mask.sum())
            return logits(of, ids, mask, wanted)

        monkeypatch.setattr(HookedRunner, "logits", watched)


def test_a_token_is_looked_at_alone_and_no_further_than_itself(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = 32  # the largest of few says little of how sensitive one token is, on any machine
    monkeypatch.setattr("verify.compare.sensitivity.DRAWS", draws)
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompts = material.prompts(SHOWN, compared=True)
    whole, some = (sensitivity_of(oracle, material, prompts[:2]) for _ in range(2))
    watched = Watched(monkeypatch)
    measured = []
    for prompt in prompts[-8:]:
        whole.measure({prompt: range(len(prompt.ids))})
        own = [whole.at(prompt, position) for position in range(len(prompt.ids) - 20)]
        far = sorted(range(len(own)), key=own.__getitem__)[-3:]  # those that are most sensitive
        measured.append({(prompt, position): own[position] for position in sorted(far)})
    first, second = sorted(measured, key=lambda of: min(of.values()))[-2:]
    moved = first | second
    assert min(moved.values()) > 1.2 * some.typical
    known = {prompt.ids[: at + 1] for prompt in prompts[-8:] for at in range(len(prompt.ids))}
    fresh = known - {
        prompt.ids[: at + 1] for prompt in prompts[:2] for at in range(len(prompt.ids))
    }
    assert watched.formed == (1 + draws) * len(fresh)
    assert {some.at(*place) for place in moved} == {some.typical}  # not looked at yet
    places: dict[Prompt, list[int]] = {}
    for prompt, position in moved:
        places.setdefault(prompt, []).append(position)
    watched.formed = watched.read = 0
    some.measure(places)
    assert watched.formed == (1 + draws) * len(moved)
    assert watched.read == (1 + draws) * sum(found[-1] + 1 for found in places.values())
    again = [some.at(*place) for place in moved]
    assert sum(own > some.typical for own in again) > len(again) / 2
    assert all(1 / 3 < one / own < 3 for one, own in zip(again, moved.values(), strict=True))
    some.measure(places)
    assert watched.formed == (1 + draws) * len(moved)  # those are known


def test_windows_that_begin_alike_are_each_looked_at(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    (*prompts, last) = material.prompts(SHOWN, compared=True)
    some, watched = sensitivity_of(oracle, material, prompts[:2]), Watched(monkeypatch)
    one, other = (replace(last, ids=(*last.ids[:30], *more)) for more in ((9, 9), (8, 7, 6)))
    some.measure({one: [10, 29], other: [20, 29]})
    assert 3 <= watched.formed / (1 + DRAWS) <= 4  # place 29 is the same


def test_of_a_large_vocabulary_some_tokens_of_the_sample_stand_for_all(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompts = material.prompts(SHOWN, compared=True)
    n_tokens = sum(len(prompt.ids) for prompt in sample(prompts))
    watched = Watched(monkeypatch)
    whole = sensitivity_of(oracle, material, prompts)
    assert watched.formed == (1 + DRAWS) * n_tokens
    watched.formed = watched.read = 0
    vocab_size = len(material.tokenizer)
    monkeypatch.setattr("verify.compare.sensitivity.SAMPLED_LOGITS", n_tokens * vocab_size // 4)
    some = sensitivity_of(oracle, material, prompts)
    assert 0.9 < 4 * watched.formed / ((1 + DRAWS) * n_tokens) < 1.1
    assert watched.read == (1 + DRAWS) * n_tokens  # up to the end, which gives the answer
    assert 0.5 < some.typical / whole.typical < 2 and some.largest <= 2 * whole.largest
    assert 0.3 < some.mean_kl / whole.mean_kl < 3


def test_the_smallest_fault_is_that_of_tokens_that_fired_one_by_one(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompts = material.prompts(SHOWN, compared=True)
    found = sensitivity_of(oracle, material, prompts)
    base, reference = HookedRunner("base", oracle.model), HookedRunner("r", oracle.model, oracle)
    shares = []
    shown = [prompts[-1], prompts[2], prompts[-2]]
    n_tokens = 0
    monkeypatch.setattr("verify.compare.sensitivity.EXAMPLE_TOKENS", len(prompts[-1].ids) + 80)
    for prompt in shown[:2]:  # with the third it would be too many tokens
        n_tokens += len(prompt.ids)
        ids = torch.tensor([prompt.ids])
        edited = every_logit(reference, ids, torch.ones_like(ids))
        assert oracle.last_fired is not None
        fired = oracle.last_fired[0].nonzero().flatten().tolist()
        effect = (edited - every_logit(base, ids, torch.ones_like(ids)))[0].abs().amax(dim=-1)
        shares += [BAR * found.at(prompt, at) / float(effect[at]) for at in fired]
    assert n_tokens + len(shown[2].ids) > len(prompts[-1].ids) + 80 >= n_tokens
    assert len(shares) > 5
    expected = float(torch.tensor(shares).median())
    assert found.smallest_fault(shown) == pytest.approx(expected, rel=1e-3)
    assert sensitivity_of(oracle, material, prompts).smallest_fault([]) is None


def test_a_token_on_a_threshold_is_known_beforehand_and_excused(
    tmp_path: Path, write_recipe: Callable[..., Path], recipe: Recipe
) -> None:
    """The threshold is moved to where one token's pre-activation is: it may fall either way."""
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    material = material_of(recipe)
    prompt = next(p for p in material.prompts(SHOWN, compared=True) if p.source == "forget")
    ids = torch.tensor([prompt.ids])
    runner = HookedRunner("reference", oracle.model, oracle)
    runner.logits(ids, torch.ones_like(ids))
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
    HookedRunner("reference", oracle.model, oracle).logits(ids, torch.ones_like(ids))
    return oracle.last_gates[1].margin[0, column, 0]
