"""Greedy continuations: in batches as one at a time, and as transformers generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from tests.worlds import save_sae_lens, tiny_base, tiny_sae, tiny_tokenizer, tiny_words
from verify.engines.continuing import go_on, mean_next, prompt_batches, stop_ids
from verify.engines.runners import HookedRunner
from verify.reference.oracle import Oracle, reconstruct_residual
from verify.reference.whole_sae import load_sites

TEXTS = [tiny_words(1 + 3 * (i % 4), i) for i in range(9)]


class Tiny:
    """A tiny model, its tokenizer, and hooks to put on it."""

    def __init__(self, folder: Path, write_recipe: Any, family: str) -> None:
        tiny_base(folder / "base", family)
        tiny_tokenizer(folder / "base")
        save_sae_lens(folder / "sae", tiny_sae())
        table = {"sae": {"path": "sae"}, "method": "clamp", "features": [0, 1], "value": -5.0}
        recipe = Recipe.load(write_recipe(table))
        self.model, self.tokenizer = load_base(recipe), load_tokenizer(recipe)
        sites = load_sites(recipe)
        self.base = HookedRunner("base", self.model)
        self.oracle = Oracle(self.model, sites)
        self.bare = Oracle(self.model, sites, reconstruct_residual)

    def ids(self, text: str) -> list[int]:
        return [2, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def one_at_a_time(self, runner: HookedRunner, text: str, stops: set[int]) -> list[int]:
        """No batch, no padding, every logit formed."""
        ids, said = self.ids(text), []
        for _ in range(10):
            input_ids = torch.tensor([ids + said])
            logits = runner.logits(input_ids, torch.ones_like(input_ids), False)
            said.append(int(logits[0, -1].argmax()))
            if said[-1] in stops:
                break
        return said

    def batched(self, runner: HookedRunner, stops: set[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for batch in prompt_batches(TEXTS, self.tokenizer):
            said = go_on(runner, batch, frozenset(stops), 10)
            found |= {p.item: ids for p, ids in zip(batch.prompts, said, strict=True)}
        return [found[item] for item in range(len(TEXTS))]


@pytest.fixture(params=["gemma2", "gemma3_text"])
def tiny(tmp_path: Path, write_recipe: Any, request: pytest.FixtureRequest) -> Tiny:
    return Tiny(tmp_path, write_recipe, request.param)


def some_stops(tiny: Tiny) -> set[int]:
    """Two tokens that end some continuations early, and others not."""
    free = [tiny.one_at_a_time(tiny.base, text, set()) for text in TEXTS]
    return {free[0][3], free[1][0]}


def test_batches_say_what_prompts_say_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = some_stops(tiny)
    said = {}
    for oracle in (None, tiny.oracle, tiny.bare):
        runner = HookedRunner("any", tiny.model, oracle)
        naive = [tiny.one_at_a_time(runner, text, stops) for text in TEXTS]
        said[oracle] = naive
        for size in (2048, 40):
            monkeypatch.setattr("bake.questions.prompts.BATCH_TOKENS", size)
            assert tiny.batched(runner, stops) == naive
    assert len({str(ids) for ids in said.values()}) == 3
    lengths = {len(ids) for ids in said[None]}
    assert 1 in lengths and 10 in lengths  # some end at once, some never


def test_the_base_goes_on_as_transformers_generates(tiny: Tiny) -> None:
    stops = some_stops(tiny)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tiny.ids(text)])
        out = tiny.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
        )
        expected.append(out[0, ids.shape[1] :].tolist())
    assert tiny.batched(tiny.base, stops) == expected


def test_mean_probabilities_are_those_of_prompts_alone(tiny: Tiny) -> None:
    shown = prompt_batches(TEXTS, tiny.tokenizer)
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tiny.ids(text)])
        rows.append(tiny.base.logits(ids, torch.ones_like(ids), False)[0, -1].double().softmax(-1))
    found = mean_next(tiny.base, shown)
    torch.testing.assert_close(found, torch.stack(rows).mean(0), rtol=0, atol=1e-6)
    assert float(found.sum()) == pytest.approx(1.0)


def test_what_ends_a_continuation(tiny: Tiny) -> None:
    assert stop_ids(tiny.tokenizer) == {1, 5}

    class Plain:
        eos_token_id, unk_token_id = 7, 3

        def convert_tokens_to_ids(self, _: str) -> int:
            return 3

    assert stop_ids(Plain()) == {7}


def test_prompts_have_bos_once_and_stand_to_the_right(tiny: Tiny) -> None:
    (batch,) = prompt_batches(["abc", "<start_of_turn>user\nabcd"], tiny.tokenizer)
    assert [prompt.item for prompt in batch.prompts] == [1, 0]
    assert all(prompt.ids.count(2) == 1 and prompt.ids[0] == 2 for prompt in batch.prompts)
    assert batch.prompts[0].ids[1] == 4  # a turn's marker is one token
    assert batch.last_only and batch.attention_mask[:, -1].all()
