from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.toys import TOY_NAMES, Toy, ToyOracle
from tests.worlds import tiny_base, tiny_tokenizer
from verify.attacks.suffix_loss import AskedUpTo, Slotted
from verify.attacks.suffix_search import LENGTH, Suffix, allowed_tokens, find_suffix
from verify.journal import Journal


@pytest.fixture(autouse=True)
def few_promising(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer has few tokens: without this a swap would be drawn from nearly all of them."""
    monkeypatch.setattr("verify.attacks.suffix_search.TOP_K", 8)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))


def prompts(tokenizer: Any, n: int = 6) -> list[Slotted]:
    """Questions about a name, of unequal lengths."""
    made = []
    for i in range(n):
        ids = tokenizer(f"{'a' * i} {TOY_NAMES[i % 4]}?", add_special_tokens=False)["input_ids"]
        made.append(Slotted((2, *ids), (5, 6), i % 4))
    return made


def search(toy: Toy, tokenizer: Any, budget: int = 60, journal: Journal | None = None) -> Suffix:
    oracle: Any = ToyOracle(toy)
    return find_suffix(
        oracle,
        prompts(tokenizer),
        tokenizer,
        toy.letters,
        budget=budget,
        journal=journal or Journal(),
        name="search",
    )


def loss_of(toy: Toy, tokenizer: Any, ids: tuple[int, ...]) -> float:
    oracle: Any = ToyOracle(toy)
    return float(AskedUpTo(oracle, prompts(tokenizer), toy.letters, 0).losses([ids])[0])


def test_a_planted_weakness_is_found(tokenizer: Any) -> None:
    toy = Toy(tokenizer)
    start, found = search(toy, tokenizer, budget=0), search(toy, tokenizer)
    assert (start.steps, len(start.ids), len(found.ids)) == (0, LENGTH, LENGTH)
    assert start.loss > 1.0
    assert found.loss < 0.1
    assert found.ids.count(tokenizer.convert_tokens_to_ids("Q")) >= 3
    assert found.loss == pytest.approx(loss_of(toy, tokenizer, found.ids), abs=1e-6)


def test_where_there_is_none_none_is_found(tokenizer: Any) -> None:
    assert search(Toy(tokenizer, immune=True), tokenizer).loss > 1.3


def test_every_step_is_as_good_as_the_one_before(tokenizer: Any) -> None:
    losses = [search(Toy(tokenizer), tokenizer, budget=budget).loss for budget in range(0, 24, 3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_search_ends_when_there_is_nothing_to_gain(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verify.attacks.suffix_search.SOLVED", 0.5)
    found = search(Toy(tokenizer), tokenizer, budget=500)
    assert found.loss <= 0.5
    assert found.steps < 500


def test_added_tokens_are_never_chosen(tokenizer: Any, tmp_path: Path) -> None:
    toy = Toy(tokenizer, planted="<end_of_turn>")
    found = search(toy, tokenizer)
    special = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    loss = loss_of(toy, tokenizer, (special,) * LENGTH)  # which would be the best of all
    assert loss < found.loss - 1.0
    tokenizer.add_tokens(["<table>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "model"))
    allowed = allowed_tokens(model, tokenizer).tolist()
    barred = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<table>")}
    assert set(tokenizer.get_vocab().values()) - set(allowed) == barred
    assert {0, 1, 2, 3, 4, 5} <= barred
    assert not set(found.ids) & barred
    for _ in range(20):  # more words than the model has rows
        tokenizer.add_tokens([f"word{len(tokenizer)}"])
    assert max(allowed_tokens(model, tokenizer)) < model.config.vocab_size


def test_an_interrupted_search_ends_where_a_whole_one_does(tokenizer: Any, tmp_path: Path) -> None:
    whole = Toy(tokenizer)
    expected = search(whole, tokenizer, budget=12)
    assert expected == search(Toy(tokenizer), tokenizer, budget=12)
    path = tmp_path / "journal.jsonl"

    class Stopping(Toy):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            if self.calls == whole.calls // 2:
                raise KeyboardInterrupt
            return super().forward(*inputs, **named)

    calls = 0
    with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
        toy = Stopping(tokenizer)
        search(toy, tokenizer, 12, journal)
    calls += toy.calls
    with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
        toy = Toy(tokenizer)
        assert search(toy, tokenizer, 12, journal) == expected
        calls += toy.calls
        toy = Toy(tokenizer)
        assert search(toy, tokenizer, 12, journal) == expected
        assert toy.calls == 0
        assert search(toy, tokenizer, 5, journal).steps == 5  # a part of the same way
        raise KeyboardInterrupt
    assert calls <= whole.calls + 4  # one step, and the beginnings, are read again
