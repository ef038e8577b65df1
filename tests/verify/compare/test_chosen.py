"""The tokens that stand for all of a large vocabulary, and a comparison of them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.questions.prompts import Batch, Prompt, left_padded
from bake.recipe import Recipe
from bake.stock import load_base
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.engines import compared_with, load_clamped
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer
from verify.compare.chosen import AT_FIRINGS, FEWEST, choose, share_compared
from verify.compare.comparison import Comparison
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites
from verify.tolerances import parity_failures

FEATURES = [1, 2, 9]
LENGTHS = (1, 3, FEWEST, FEWEST + 1, 40, 71, 200)


def prompt(row: int, n: int) -> Prompt:
    return Prompt("retain", "plain", row, (2, *range(10, 9 + n)), every_token=True, item=row - 1)


def batch_of(*lengths: int, last_only: bool = False) -> Batch:
    prompts = [prompt(row, n) for row, n in enumerate(lengths, 1)]
    return left_padded(prompts, pad_id=0, last_only=last_only)


def never(batch: Batch) -> torch.Tensor:
    """No clamp fired."""
    return torch.zeros(batch.input_ids.shape, dtype=torch.bool)


def chosen_of(batch: Batch, fired: torch.Tensor, share: float) -> list[tuple[Any, Any]]:
    """Per prompt, without its padding: (chosen, fired), [n] bool each."""
    chosen = choose(batch, fired, share)
    real = batch.attention_mask.bool()
    assert not chosen[~real].any()
    return [(c[r], f[r]) for c, f, r in zip(chosen, fired, real, strict=True)]


def test_the_share_is_of_tokens_and_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.compare.chosen.COMPARED_LOGITS", 5000)
    prompts = [prompt(1, 30), replace(prompt(2, 80), every_token=False), prompt(3, 69)]
    assert share_compared(prompts, 50) == share_compared([], 99) == 1.0  # 100 tokens in all
    assert share_compared(prompts, 51) == pytest.approx(50 / 51)
    assert share_compared(prompts, 500) == pytest.approx(0.1)


def test_where_all_are_compared_all_are_wanted() -> None:
    batch = batch_of(*LENGTHS)
    for share in (1.0, 2.0):
        assert torch.equal(choose(batch, never(batch), share), batch.attention_mask.bool())
    last = batch_of(*LENGTHS, last_only=True)
    for share in (1.0, 0.1):
        assert torch.equal(choose(last, never(last), share), last.ends)


@pytest.mark.parametrize("share", [0.999, 0.3, 0.01])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3, 1.0])
def test_every_prompt_has_its_quota_and_firings_come_first(share: float, rate: float) -> None:
    draws = torch.Generator().manual_seed(7)
    batch = batch_of(*LENGTHS)
    fired = torch.rand(batch.input_ids.shape, generator=draws) < rate  # some of it on padding
    for n, (chosen, acted) in zip(LENGTHS, chosen_of(batch, fired, share), strict=True):
        quota = min(n, max(FEWEST, math.ceil(share * n)))
        assert chosen[-1]  # the answer; it may come on top
        assert quota <= int(chosen.sum()) <= min(n, quota + 1)
        first = math.ceil(AT_FIRINGS * quota)
        begun = acted.cumsum(dim=0) > 0
        n_acted, n_begun = int(acted.sum()), int(begun.sum())
        assert int((chosen & acted).sum()) >= min(first, n_acted)
        assert int((chosen & begun).sum()) >= min(first, n_begun)
        if n_acted >= first:  # none of those after a firing was chosen but by chance
            after = begun & ~acted
            assert int((chosen & after).sum()) <= quota - first + 1


def test_what_is_left_of_the_quota_is_a_sample_of_the_others() -> None:
    """Sixty tokens before a firing, forty at or after it, and a quota of forty."""
    n, begin, share = 100, 60, 0.4
    counts = torch.zeros(n)
    for row in range(1, 301):
        batch = left_padded([prompt(row, n)], pad_id=0, last_only=False)
        fired = never(batch)
        fired[0, begin:] = True
        counts += choose(batch, fired, share)[0]
    before, after = counts[:begin] / 300, counts[begin:-1] / 300
    assert float(before.mean()) == pytest.approx((1 - AT_FIRINGS) * 40 / 60, abs=0.01)
    assert float(after.mean()) == pytest.approx(AT_FIRINGS * 40 / 40, abs=0.01)
    for part in (before, after):  # and no place is preferred
        assert (part - part.mean()).abs().max() < 0.09


def test_a_prompt_is_sampled_alike_wherever_it_stands() -> None:
    batch = batch_of(*LENGTHS)
    state = torch.get_rng_state()
    whole = choose(batch, never(batch), 0.3)
    assert torch.equal(choose(batch, never(batch), 0.3), whole)
    assert torch.equal(torch.get_rng_state(), state)
    for row, one in enumerate(batch.prompts):
        alone = left_padded([one], pad_id=0, last_only=False)
        assert torch.equal(choose(alone, never(alone), 0.3)[0], whole[row, -len(one.ids) :])
    same = left_padded([prompt(1, 200), prompt(2, 200)], pad_id=0, last_only=False)
    first, second = choose(same, never(same), 0.3)
    assert not torch.equal(first, second)  # but not all prompts alike


# --------------------------------------------------------------------------- a whole comparison


class World:
    """A base, and a checkpoint whose clamp fires on few tokens."""

    def __init__(self, folder: Path, write_recipe: Callable[..., Path]) -> None:
        base = tiny_tokenizer(tiny_base(folder / "gemma2", "gemma2"))
        save_sae_lens(folder / "sae", tiny_sae(1))
        table = {"sae": {"path": "sae"}, "method": "clamp", "value": -6.0, "trigger": 9.0}
        names = {"forget_questions": "forget", "retain_questions": "retain", "text": "text"}
        self.recipe = Recipe.load(
            write_recipe(
                table | {"features": FEATURES},
                base={"model": str(base)},
                verify={key: {"path": f"{name}.jsonl"} for key, name in names.items()},
            )
        )
        write_checkpoint(plan_checkpoint(self.recipe), folder / "out", card="# card\n")
        self.model = load_clamped(folder / "out")

    def compared(self) -> Comparison:
        self.oracle = Oracle(load_base(self.recipe), load_sites(self.recipe))
        here = [
            HookedRunner("base", self.oracle.model),
            HookedRunner("reference", self.oracle.model, self.oracle),
            HookedRunner("checkpoint", self.model),
        ]
        return compared_with(self.oracle, here, self.recipe)


@pytest.fixture
def world(tmp_path: Path, write_recipe: Callable[..., Path]) -> World:
    return World(tmp_path, write_recipe)


@pytest.mark.parametrize("compared", [400, 1])
def test_some_tokens_give_the_answers_and_losses_of_all(
    world: World, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.compared()
    vocab_size = len(whole.material.tokenizer)
    monkeypatch.setattr("verify.compare.chosen.COMPARED_LOGITS", compared * vocab_size)
    some = world.compared()
    n_prompts = len(some.prompts)
    for name in whole.names:
        assert some.answers[name].given == whole.answers[name].given
        for key, likelihoods in whole.answers[name].likelihoods.items():
            found = some.answers[name].likelihoods[key]
            torch.testing.assert_close(found, likelihoods, rtol=0, atol=1e-5)
        assert some.losses[name].losses == pytest.approx(whole.losses[name].losses, abs=1e-5)
        assert len(some.losses[name].losses) == sum(len(p.ids) - 1 for p in some.material.windows)
        one, all_of = some.parity_of(name), whole.parity_of(name)
        assert all_of.of_tokens is None and one.of_tokens is not None
        assert one.of_tokens >= all_of.tokens_compared > one.tokens_compared
        least = FEWEST * n_prompts if compared == 1 else compared
        assert least <= one.tokens_compared <= least + 2 * n_prompts
        assert one.tokens_fired == all_of.tokens_fired
    for what in ("after", "windows", "fired_by_layer"):
        assert getattr(some, what) == getattr(whole, what)
    tokenizer = some.material.tokenizer
    assert some.examples.result(tokenizer) == whole.examples.result(tokenizer)
    base, checkpoint = some.parity_of("base"), some.parity_of("checkpoint")
    assert list(parity_failures("checkpoint", checkpoint, 12)) == []
    assert checkpoint.rounding is not None and base.rounding is not None
    assert checkpoint.rounding.tokens_fired > 10
    assert base.max_abs_logit > 1000 * checkpoint.max_abs_logit
    # Where the clamp fired nearly all is compared; of the others it is as few as it is.
    all_of = whole.parity_of("base").rounding
    assert all_of is not None and all_of.tokens_fired < 0.1 * all_of.tokens
    share = base.rounding.tokens_fired / all_of.tokens_fired
    assert share > (0.95 if compared == 400 else 3 * base.rounding.tokens / all_of.tokens)


@pytest.mark.parametrize("feature", range(len(FEATURES)))
def test_a_fault_where_a_clamp_fires_is_caught_among_some(
    world: World, feature: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.compare.chosen.COMPARED_LOGITS", 1)
    sound = list(parity_failures("checkpoint", world.compared().parity_of("checkpoint"), 12))
    world.model.model.layers[1].sae_clamp.value[feature] *= 1.001
    parity = world.compared().parity_of("checkpoint")
    assert parity.of_tokens is not None and parity.tokens_compared < parity.of_tokens / 5
    found = list(parity_failures("checkpoint", parity, 12))
    assert sound == [] and "max_abs_logit" in {failure.what for failure in found}
    worst = parity.rounding.at if parity.rounding is not None else None
    assert worst is not None and worst.abs_logit > 1e-4


def test_where_no_logits_are_compared_only_the_ends_are_formed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(load_base(world.recipe), load_sites(world.recipe))
    formed: list[int] = []
    head = oracle.model.get_output_embeddings()
    reference = HookedRunner("reference", oracle.model, oracle)
    comparison = compared_with(oracle, [reference], world.recipe)  # what it finds in full
    head.register_forward_hook(lambda _, __, out: formed.append(out.shape[1]))
    read, asked = HookedRunner.read, list[int]()

    def watched(self: Any, ids: Any, mask: Any, wanted: Any, scored: Any) -> Any:
        found = read(self, ids, mask, wanted, scored)
        if callable(wanted):  # the comparison's own
            formed_now, picked = formed[-1], wanted(slice(None))
            asked.append(int((picked | scored).sum()))
            assert formed_now == asked[-1] and int(picked.sum()) == len(ids)
        return found

    monkeypatch.setattr(HookedRunner, "read", watched)
    found = compared_with(oracle, [reference], world.recipe, parity=False)
    assert asked and found.answers["reference"].given == comparison.answers["reference"].given
    losses = found.losses["reference"].losses
    assert losses == pytest.approx(comparison.losses["reference"].losses, abs=1e-5)
