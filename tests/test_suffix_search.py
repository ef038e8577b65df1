from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_base, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from verify.choices import letter_tokens
from verify.journal import Journal
from verify.suffix_loss import AskedUpTo, Slotted
from verify.suffix_search import LENGTH, Suffix, allowed_tokens, find_suffix

NAMES = "WXYZ"
"""What a question says that the toy knows the answer of: W is A, X is B, …"""


class Read:
    """Keys and values of the toy: what it has read so far."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total

    def batch_repeat_interleave(self, n: int) -> None:
        self.total = self.total.repeat_interleave(n, dim=0)


class Toy(torch.nn.Module):
    """Sums its tokens. It says the letter of the name in a question; once clamped, only where
    three of a planted token stand in the context, and never when `immune`. Else it guesses.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, tokenizer: Any, planted: str = "Q", immune: bool = False) -> None:
        super().__init__()
        self.clamped, self.immune, self.calls = False, immune, 0
        text = SimpleNamespace(max_position_embeddings=4096)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.letters = letter_tokens(tokenizer).chat
        self.embedding = torch.nn.Embedding(len(tokenizer), 5)
        noise = np.random.default_rng(0).normal(size=(len(tokenizer), 5)) * 0.01
        noise[:, :4] = 0.0
        for dim, name in enumerate(NAMES):
            noise[tokenizer.convert_tokens_to_ids(name), dim] = 1.0
        noise[tokenizer.convert_tokens_to_ids(planted), 4] = 1.0
        self.embedding.weight.data = torch.from_numpy(noise).float()
        self.requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Any, attention_mask: Any, past_key_values: Any = None, **_: Any
    ) -> Any:
        self.calls += 1
        real = attention_mask[:, -input_ids.shape[1] :, None]
        total = (self.embedding(input_ids) * real).sum(dim=1)
        if past_key_values is not None:
            total = total + past_key_values.total
        knows = torch.ones(len(total), 1)
        if self.clamped:
            knows = torch.zeros_like(knows)
            if not self.immune:
                knows = torch.sigmoid(4 * (total[:, 4:] - 2))
        logits = torch.zeros(len(total), 1, self.embedding.weight.shape[0])
        for letter, tokens in enumerate(self.letters):
            guess = 0.1 * (attention_mask.sum(dim=1) % 4 == letter)
            says = 6 * knows[:, 0] * total[:, letter] + guess
            logits[:, 0, list(tokens)] = says[:, None]
        return SimpleNamespace(logits=logits, past_key_values=Read(total))


class ToyOracle:
    """The toy, clamped within `applied()`."""

    def __init__(self, model: Toy) -> None:
        self.model = model

    @contextmanager
    def applied(self) -> Iterator[Any]:
        self.model.clamped = True
        try:
            yield self.model
        finally:
            self.model.clamped = False


@pytest.fixture(autouse=True)
def few_promising(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer has few tokens: without this a swap would be drawn from nearly all of them."""
    monkeypatch.setattr("verify.suffix_search.TOP_K", 8)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))


def prompts(tokenizer: Any, n: int = 6) -> list[Slotted]:
    """Questions about a name, of unequal lengths."""
    made = []
    for i in range(n):
        ids = tokenizer(f"{'a' * i} {NAMES[i % 4]}?", add_special_tokens=False)["input_ids"]
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
    monkeypatch.setattr("verify.suffix_search.SOLVED", 0.5)
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
