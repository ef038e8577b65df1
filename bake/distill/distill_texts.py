"""Texts that a model is trained on, in tokens; which of them make up each step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bake.errors import DataError, RecipeError
from bake.questions.corpora import MIN_CHARACTERS, corpus_texts, special_ids
from bake.questions.forms import FORMS
from bake.questions.multiple_choice import Question
from bake.questions.orders import orders_in
from bake.recipe import Recipe
from bake.search.selection import split_questions
from bake.sources import Corpus

FEWEST_TEXTS = 10
"""Of fewer texts no tenth can be kept to judge by."""
HELD_OUT = 10
"""One text in so many is not trained on."""
ORDERS_ASKED = 8
"""Orders of a question's choices in which it is a text, of 24."""
LIKE_LENGTHS = 16
"""Batches among which texts of like length go together, so that little is padding."""
SIDES = ("forget", "retain")


@dataclass(frozen=True)
class Rows:
    """Some pieces of texts in tokens."""

    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    """BOS first."""

    @property
    def sha256(self) -> str:
        """Of the tokens, piece by piece."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()

    def batch(self, numbers: Sequence[int]) -> Rows:
        """Some of them, by their numbers."""
        return Rows(tuple(self.ids[number] for number in numbers))

    def padded(self, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """([n, seq] token ids, padded on the right; [n, seq] bool, the real ones)."""
        longest = max(map(len, self.ids))
        ids = torch.zeros(len(self.ids), longest, dtype=torch.long)
        real = torch.zeros(len(self.ids), longest, dtype=torch.bool)
        for row, tokens in enumerate(self.ids):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            real[row, : len(tokens)] = True
        return ids.to(device), real.to(device)


@dataclass(frozen=True)
class Texts:
    """A corpus, split."""

    name: str
    trained: Rows
    held_out: Rows
    """Of other texts."""


def load_sides(recipe: Recipe, tokenizer: Any, seed: int) -> dict[str, Texts]:
    """The forget and the retain corpus that a recipe's [distill] or [select] table names.

    Raises:
        RecipeError: neither table names any.
        DataError: a corpus cannot be read, or is too small to split.
    """
    table = recipe.distill
    named = table if table is not None and table.forget is not None else recipe.select
    if named is None or named.forget is None or named.retain is None:
        raise RecipeError(
            "the recipe names no texts to train on; expected a [distill] table with `forget` and "
            "`retain`, or a [select] table"
        )
    corpora = {"forget": named.forget, "retain": named.retain}
    asked = _questions(recipe)
    return {
        side: load_texts(corpora[side], asked.get(side, ()), recipe, tokenizer, seed)
        for side in SIDES
    }


def _questions(recipe: Recipe) -> dict[str, list[Question]]:
    """By side, the questions that [select] names, which are none of [verify]'s; without them,
    nothing. In texts a fact is stated; that it is not chosen either has to be learned of questions.

    Raises:
        DataError: they cannot be read, or [verify] has one of them.
    """
    select = recipe.select
    if recipe.verify is None or select is None:
        return {}
    if select.forget_questions is None or select.retain_questions is None:
        return {}
    return split_questions(recipe).validation


def load_texts(
    source: Corpus, questions: Sequence[Question], recipe: Recipe, tokenizer: Any, seed: int
) -> Texts:
    """Read, split and tokenise a corpus, and questions on the same: those with their answers, each
    in some orders of its choices, which stay together.

    Args:
        source: the corpus.
        questions: written in the prompt form that leads the recipe's report.
        recipe: says how many texts, and how long a piece of one may be.
        tokenizer: the base model's.
        seed: of which texts and questions are kept to judge by.

    Raises:
        DataError: it cannot be read, or is too small to split.
    """
    table = recipe.distill_table
    bos, eos, _ = special_ids(tokenizer)
    name = " ".join(filter(None, (source.path, source.dataset, source.config)))
    texts = list(islice(corpus_texts(source, recipe, tokenizer), table.n_texts))
    if len(texts) < FEWEST_TEXTS:
        raise DataError(
            f"{name}: has {len(texts)} texts over {MIN_CHARACTERS} characters; expected at least "
            f"{FEWEST_TEXTS}, of which a tenth is kept to judge by"
        )
    orders = random.Random(f"orders {seed}")
    asked = [_asked(question, recipe, orders) for question in questions]
    shuffled = random.Random(f"held out {seed}").shuffle
    parts: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}
    for items in ([[text] for text in texts], asked):
        shuffled(items)
        for number, item in enumerate(items):
            encoded = tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"]
            parts[number % HELD_OUT == 0] += _pieces(encoded, bos, eos, table.seq_len)
    return Texts(name, Rows(tuple(parts[False])), Rows(tuple(parts[True])))


def _asked(question: Question, recipe: Recipe, rng: random.Random) -> list[str]:
    """A question with its answer, in some orders of its choices."""
    assert recipe.verify is not None
    form = recipe.verify.prompt
    orders = orders_in(question, form)
    some = rng.sample(orders, min(ORDERS_ASKED, len(orders)))
    return [FORMS[form].solved(of).strip() for of in some]


def _pieces(
    encoded: Sequence[Sequence[int]], bos: int, eos: int, seq_len: int
) -> Iterator[tuple[int, ...]]:
    """Texts in tokens, each ended by EOS, in pieces that BOS begins."""
    body = seq_len - 1
    for ids in encoded:
        whole = [*ids, eos]
        yield from ((bos, *whole[at : at + body]) for at in range(0, len(whole), body))


def batches_of(rows: Rows, size: int, n_steps: int, seed: str) -> list[list[int]]:
    """The rows of every step: all of them in an order drawn anew each time they are gone through,
    those of like length together.
    """
    rng = random.Random(f"batches {seed}")
    found: list[list[int]] = []
    while len(found) < n_steps:
        numbers = list(range(len(rows.ids)))
        rng.shuffle(numbers)
        batches: list[list[int]] = []
        for at in range(0, len(numbers), LIKE_LENGTHS * size):
            group = sorted(numbers[at : at + LIKE_LENGTHS * size], key=lambda n: len(rows.ids[n]))
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        rng.shuffle(batches)
        found += batches
    return found[:n_steps]
