"""A toy language model that can be clamped and attacked, without weights to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bake.questions.answers import letter_tokens

TOY_NAMES = "WXYZ"
"""What a question says that the toy knows the answer of: W is A, X is B, …"""


class ToyCache:
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
        for dim, name in enumerate(TOY_NAMES):
            noise[tokenizer.convert_tokens_to_ids(name), dim] = 1.0
        noise[tokenizer.convert_tokens_to_ids(planted), 4] = 1.0
        self.embedding.weight.data = torch.from_numpy(noise).float()
        self.head = torch.nn.Linear(4, len(tokenizer), bias=False)
        self.head.weight.data.zero_()
        for letter, tokens in enumerate(self.letters):
            self.head.weight.data[list(tokens), letter] = 1.0
        self.requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        self.calls += 1
        n = input_ids.shape[1]
        real = attention_mask[:, -n:, None]
        total = (self.embedding(input_ids) * real).cumsum(dim=1)  # [batch, seq, 5]
        if past_key_values is not None:
            total = total + past_key_values.total[:, None]
        knows = torch.ones(1)
        if self.clamped:
            knows = 0.0 * knows if self.immune else torch.sigmoid(4 * (total[..., 4:] - 2))
        n_read = attention_mask.cumsum(dim=1)[:, -n:, None]
        guess = 0.1 * (n_read % 4 == torch.arange(4))
        says = (6 * knows * total[..., :4] + guess)[:, -logits_to_keep:]
        return SimpleNamespace(logits=self.head(says), past_key_values=ToyCache(total[:, -1]))


class ToyOracle:
    """The toy, clamped within `applied()`."""

    gated = False

    def __init__(self, model: Toy) -> None:
        self.model = model

    @contextmanager
    def applied(self) -> Iterator[Any]:
        self.model.clamped = True
        try:
            yield self.model
        finally:
            self.model.clamped = False

    def in_halves(self, run: Callable[[slice], Any], n: int, _: int) -> Any:
        return run(slice(n))
