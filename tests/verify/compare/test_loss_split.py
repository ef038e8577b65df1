from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bake.questions.prompts import Prompt, left_padded
from bake.recipe import Recipe
from bake.stock import load_base
from tests.logits import token_losses
from tests.worlds import save_sae_lens, tiny_base, tiny_sae
from verify.compare.loss_split import (
    EDGES,
    LossHistogram,
    LossSplit,
    after_firing,
    histogram,
    split,
)
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle
from verify.reference.whole_sae import load_sites


def test_predictions_at_or_after_the_first_firing() -> None:
    rows = [(2, 31, 32, 33, 34), (2, 41, 42), (2, 51, 52, 53)]
    prompts = [Prompt("text", "text", 1, ids, every_token=True) for ids in rows]
    asked = Prompt("forget", "chat", 1, (2, 61, 62), every_token=True)
    batch = left_padded([*prompts[:2], asked, prompts[2]], pad_id=0, last_only=False)
    fired = torch.zeros(4, 5).bool()
    # Row 0: position 2 predicts token 3. Row 1 fires on its last token, which predicts none; row 2
    # is no text.
    fired[[0, 1, 2], [2, 4, 3]] = True
    expected = [False, False, True, True] + [False] * 2 + [False] * 3
    assert after_firing(fired, batch.scored).tolist() == expected


def test_the_order_is_that_of_token_losses() -> None:
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (4, 7), generator=draws)
    mask = (torch.arange(7)[None] >= torch.tensor([[0], [3], [5], [1]])).long()
    fired = (torch.rand(4, 7, generator=draws) < 0.3) & mask.bool()
    scored = mask.bool()
    scored[:, -1] = False
    # Logits that give every token of a prediction after a firing no loss, every other some.
    begun = torch.stack(
        [torch.stack([fired[b][: t + 1].any() for t in range(7)]) for b in range(4)]
    )
    logits = torch.zeros(4, 7, 20)
    for b in range(4):
        for t in range(6):
            if begun[b][t]:
                logits[b, t, ids[b, t + 1]] = 100.0
    losses = token_losses(logits, ids, mask)
    assert after_firing(fired, scored).tolist() == (losses < 1e-6).tolist()


def test_parts_against_sums_by_hand() -> None:
    base = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    edited = torch.tensor([1.0, 2.5, 3.0, 3.0]).double()
    found = split(base, edited, torch.tensor([False, True, False, True]))
    assert (found.before.n_tokens, found.before.total, found.before.max_abs) == (2, 0.0, 0.0)
    assert (found.after.n_tokens, found.after.total, found.after.max_abs) == (2, -0.5, 1.0)
    assert (found.after.mean, found.whole.mean) == (-0.25, -0.125)
    assert LossSplit().whole.mean is None
    twice = found + found
    assert (twice.whole.n_tokens, twice.whole.total, twice.after.max_abs) == (8, -1.0, 1.0)
    assert found + LossSplit() == found


def test_a_histogram_counts_every_token_once() -> None:
    added = [0.0, 1e-9, -1e-9, 0.01, -0.01, 0.3, -20.0, 20.0, 8.0, math.nan, math.inf, -4.0]
    nothing, tensor = torch.zeros(len(added)).double(), torch.tensor(added, dtype=torch.float64)
    found = histogram(nothing, tensor)
    assert (found.unchanged, found.not_finite) == (1, 2)
    bounds = (-math.inf, *EDGES, math.inf)
    expected = [
        sum(low <= x < high and x != 0 and math.isfinite(x) for x in added)
        for low, high in itertools.pairwise(bounds)
    ]
    assert list(found.counts) == expected
    assert sum(found.counts) + found.unchanged + found.not_finite == len(added)
    assert found + found == histogram(nothing.repeat(2), tensor.repeat(2))
    assert LossHistogram() + found == found


def test_a_loss_that_is_not_finite_stays_seen() -> None:
    base, after = torch.zeros(2).double(), torch.tensor([True, False])
    found = split(base, torch.tensor([math.inf, 0.0]).double(), after)
    assert math.isnan(found.after.max_abs)
    assert math.isnan((found + LossSplit()).whole.max_abs)
    assert math.isnan((LossSplit() + found).after.total)
    assert found.before.max_abs == 0.0


def test_lengths_must_agree() -> None:
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match="3 losses of the base, 2 of the other"):
        histogram(three, two)
    with pytest.raises(ValueError, match="3 losses, 2 flags"):
        split(three, three, two.bool())


def test_nothing_is_added_before_the_first_firing(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    tiny_base(tmp_path / "base")
    save_sae_lens(tmp_path / "sae", tiny_sae())
    table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0], "value": -5.0}
    recipe = Recipe.load(write_recipe(table))
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    prompts = [
        Prompt("text", "text", n, (2, *range(7 + 3 * n, 40 - n)), every_token=True)
        for n in range(6)
    ]
    batch = left_padded(prompts, pad_id=0, last_only=False)
    inputs = (batch.input_ids, batch.attention_mask, batch.ends, batch.scored)
    base = HookedRunner("base", oracle.model).read(*inputs).losses
    edited = HookedRunner("reference", oracle.model, oracle).read(*inputs).losses
    assert oracle.last_fired is not None
    after = after_firing(oracle.last_fired, batch.scored)
    assert 0 < int(after.sum()) < len(after)
    found = split(base, edited, after)
    assert found.before.max_abs == 0.0
    assert found.after.max_abs > 1e-3
