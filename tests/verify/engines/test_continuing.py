"""Greedy continuations: in batches as one at a time, and as transformers generates."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.questions.prompts import Prompt, left_padded
from bake.recipe import Recipe
from bake.stock import load_base, load_tokenizer
from export.carriers.checkpoint import plan_checkpoint, write_checkpoint
from tests.logits import every_logit, one_after_another
from tests.worlds import (
    KINDS,
    VOCAB,
    save_sae_lens,
    talkative,
    tiny_base,
    tiny_sae,
    tiny_tokenizer,
    tiny_words,
)
from verify.engines.continuing import go_on, mean_next, prompt_batches, stop_ids
from verify.engines.runners import HookedRunner, TorchRunner
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
        self.model.get_input_embeddings().weight.data *= 0.2  # so that it says different things
        sites = load_sites(recipe)
        self.base = HookedRunner("base", self.model)
        self.oracle = Oracle(self.model, sites)
        self.bare = Oracle(self.model, sites, reconstruct_residual)

    def ids(self, text: str) -> list[int]:
        return [2, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def one_at_a_time(self, runner: HookedRunner, text: str, stops: set[int]) -> list[int]:
        """No batch, no padding, nothing cached, every logit formed."""
        ids = torch.tensor([self.ids(text)])
        (said,) = one_after_another(runner, ids, torch.ones_like(ids), sorted(stops), 10)
        return said

    def batched(self, runner: HookedRunner, stops: set[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for batch in prompt_batches(TEXTS, self.tokenizer):
            said = go_on(runner, batch, frozenset(stops), 10)
            found |= {p.item: ids for p, ids in zip(batch.prompts, said, strict=True)}
        return [found[item] for item in range(len(TEXTS))]


@pytest.fixture(params=KINDS)
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


def generated(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, stops: Collection[int]
) -> list[list[int]]:
    """What transformers says, each prompt as far as its end."""
    rows = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )[:, ids.shape[1] :].tolist()
    ends = [next((i for i, t in enumerate(row) if t in stops), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def test_base_and_reference_go_on_as_transformers_generates(tiny: Tiny) -> None:
    stops = some_stops(tiny)
    for oracle in (None, tiny.oracle):
        runner = HookedRunner("any", tiny.model, oracle)
        expected = []
        with nullcontext(tiny.model) if oracle is None else oracle.applied() as model:
            for text in TEXTS:
                ids = torch.tensor([tiny.ids(text)])
                expected += generated(model, ids, torch.ones_like(ids), stops)
        assert tiny.batched(runner, stops) == expected


def test_a_runner_marks_what_is_beyond_an_end(tiny: Tiny) -> None:
    (batch,) = prompt_batches(TEXTS[:4], tiny.tokenizer)
    inputs = (batch.input_ids, batch.attention_mask)
    assert len(set(batch.attention_mask.sum(dim=1).tolist())) == 4  # padded
    stops = sorted(some_stops(tiny))
    for runner in (tiny.base, HookedRunner("reference", tiny.model, tiny.oracle)):
        free = one_after_another(runner, *inputs, [], 10)
        assert runner.go_on(*inputs, [], 10).tolist() == free
        assert runner.go_on(*inputs, [], 1).tolist() == [row[:1] for row in free]
        naive = one_after_another(runner, *inputs, stops, 10)
        longest = max(len(row) for row in naive)
        said = runner.go_on(*inputs, stops, 10)
        assert said.dtype == torch.int64
        assert said.tolist() == [row + [-1] * (longest - len(row)) for row in naive]
        every = list(range(VOCAB))
        assert runner.go_on(*inputs, every, 10).tolist() == [row[:1] for row in free]
    assert not tiny.model._forward_pre_hooks


def test_a_folder_goes_on_as_its_reference_does(tmp_path: Path) -> None:
    recipe = Recipe.load(talkative(tmp_path))
    oracle = Oracle(load_base(recipe), load_sites(recipe))
    prompts = [
        Prompt("prompts", "text", n, (2, *range(10 * n, 10 * n + 9 * n)), every_token=False)
        for n in (1, 2, 3, 4)
    ]
    batch = left_padded(prompts, pad_id=0, last_only=True)
    inputs = (batch.input_ids, batch.attention_mask)
    write_checkpoint(plan_checkpoint(recipe), tmp_path / "out", card="# card\n")
    with TorchRunner(tmp_path / "out") as folder:
        folder.load("float32")
        free = one_after_another(folder, *inputs, [], 10)
        stops = [free[0][3], free[1][0]]
        naive = one_after_another(folder, *inputs, stops, 10)
        longest = max(len(row) for row in naive)
        expected = [row + [-1] * (longest - len(row)) for row in naive]
        for runner in (folder, HookedRunner("reference", oracle.model, oracle)):
            assert runner.go_on(*inputs, stops, 10).tolist() == expected
            assert runner.go_on(*inputs, [], 10).tolist() == free
        assert HookedRunner("base", oracle.model).go_on(*inputs, [], 10).tolist() != free
        with pytest.raises(ValueError, match="padded on the left"):
            folder.go_on(inputs[0], inputs[1].flip(-1), [], 1)
    assert len({len(row) for row in naive}) > 1  # some end before others


def test_mean_probabilities_are_those_of_prompts_alone(tiny: Tiny) -> None:
    shown = prompt_batches(TEXTS, tiny.tokenizer)
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tiny.ids(text)])
        last = every_logit(tiny.base, ids, torch.ones_like(ids))[0, -1]
        rows.append(last.double().softmax(-1))
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


def test_gemma_4_ends_its_turns_otherwise(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    turns = tiny_tokenizer(tmp_path, ("<|turn>", "<turn|>"))
    assert stop_ids(AutoTokenizer.from_pretrained(turns)) == {1, 5}


def test_prompts_have_bos_once_and_stand_to_the_right(tiny: Tiny) -> None:
    (batch,) = prompt_batches(["abc", "<start_of_turn>user\nabcd"], tiny.tokenizer)
    assert [prompt.item for prompt in batch.prompts] == [1, 0]
    assert all(prompt.ids.count(2) == 1 and prompt.ids[0] == 2 for prompt in batch.prompts)
    assert batch.prompts[0].ids[1] == 4  # a turn's marker is one token
    assert batch.last_only and batch.attention_mask[:, -1].all()
