from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bake.errors import ModelError
from bake.questions.answers import (
    DECIDES,
    NORMALISED,
    Answers,
    LetterTokens,
    best_choice,
    best_letters,
    choice_log_likelihoods,
    letter_tokens,
)
from bake.questions.multiple_choice import Question
from bake.questions.prompts import Batch, Choice, Prompt, left_padded
from tests.worlds import tiny_tokenizer

# Tokens 10 to 13 are "A" to "D", 20 to 23 are " A" to " D".
LETTERS = LetterTokens(
    chat=((10, 20), (11, 21), (12, 22), (13, 23)), plain=((20,), (21,), (22,), (23,))
)
VOCAB = 30


def logits(**at: float) -> torch.Tensor:
    """One row: `_10=2.0` puts 2 on token 10; every other token has -5."""
    row = torch.full((VOCAB,), -5.0)
    for name, value in at.items():
        row[int(name[1:])] = value
    return row


@pytest.mark.parametrize(
    ("row", "chat", "plain"),
    [
        (logits(_11=3.0, _22=2.0), "B", "C"),  # the bare letter counts in chat form only
        (logits(_11=2.0, _22=3.0), "C", "C"),  # the better of a letter's two tokens
        (logits(_10=2.0, _20=2.5, _13=2.4, _23=2.2), "A", "A"),
        (logits(_10=1.0, _21=0.5, _29=99.0), "A", "B"),  # no other token matters
        (logits(_13=-1.0, _23=-2.0), "D", "D"),
    ],
)
def test_the_best_letter(row: torch.Tensor, chat: str, plain: str) -> None:
    assert best_letters(row[None], LETTERS.chat) == ["ABCD".index(chat)]
    assert best_letters(row[None], LETTERS.plain) == ["ABCD".index(plain)]


def test_best_letter_is_that_of_the_log_likelihoods() -> None:
    rows = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0))
    likelihoods = rows.double().softmax(-1).log()[:, 20:24]
    assert best_letters(rows, LETTERS.plain) == likelihoods.argmax(-1).tolist()


def question(answer: int) -> Question:
    return Question("?", ("w", "x", "y", "z"), answer, None, row=1)


def prompt(source: str, form: str, item: int, length: int = 3) -> Prompt:
    return Prompt(source, form, item + 1, tuple(range(length)), every_token=True, item=item)


def batch(*prompts: Prompt) -> Batch:
    return left_padded(prompts, pad_id=0, last_only=False)


def test_accuracy_counts_each_set_and_form() -> None:
    answers = Answers(LETTERS)
    right, wrong = logits(_21=5.0), logits(_22=5.0, _11=4.0)
    rows = [
        (prompt("forget", "chat", 0), right),
        (prompt("forget", "chat", 1), wrong),
        (prompt("forget", "plain", 0), wrong),
        (prompt("forget", "plain", 1, length=2), wrong),
        (prompt("retain", "chat", 0), right),
        (prompt("retain", "plain", 0), right),
        (prompt("text", "text", -1), right),
    ]
    ends = torch.stack([last for _, last in rows])
    answers.add(batch(*(p for p, _ in rows)), ends, torch.zeros(0))
    forget = answers.accuracy("forget", [question(1), question(1)])
    assert (forget.chat, forget.plain) == (0.5, 0.0)
    retain = answers.accuracy("retain", [question(1)])
    assert (retain.chat, retain.plain) == (1.0, 1.0)
    assert len(answers.given) == 6


# --------------------------------------------------------------------------- choices' own texts


def of_choices(item: int, *lengths: tuple[int, int]) -> list[Prompt]:
    """Prompts that end with choices of so many tokens and characters."""
    return [
        Prompt(
            *("forget", "cloze", item + 1, tuple(range(3 + n_tokens))),
            every_token=False,
            item=item,
            choice=Choice(index, n_tokens, n_characters),
        )
        for index, (n_tokens, n_characters) in enumerate(lengths)
    ]


def test_each_length_may_pick_another_choice() -> None:
    asked = of_choices(0, (1, 2), (3, 5), (2, 20), (1, 1))
    likelihoods = [-3.0, -5.0, -6.0, -9.0]
    assert {by: best_choice(likelihoods, asked, by) for by in NORMALISED} == {
        "summed": 0,  # -3
        "per_character": 2,  # -1.5, -1, -0.3, -9
        "per_token": 1,  # -3, -1.67, -3, -9
    }
    assert best_choice(likelihoods, asked) == best_choice(likelihoods, asked, DECIDES)


def test_of_equal_choices_the_first_is_taken() -> None:
    asked = of_choices(0, (1, 2), (1, 4), (1, 4), (1, 4))
    assert best_choice([-3.0, -4.0, -4.0, -4.0], asked, "per_character") == 1


def test_losses_of_choices_become_answers_and_text_is_none_of_them() -> None:
    first, second = of_choices(0, (1, 1), (2, 1), (1, 1), (3, 1)), of_choices(1, *[(1, 1)] * 4)
    shown = left_padded([*first, *second], pad_id=0, last_only=True)
    nats = [3.0, 1.0, 1.5, 2.25, 1.0, 1.0, 1.0, 0.4, 0.3, 0.1, 0.2]
    losses = torch.tensor(nats, dtype=torch.float64)
    assert choice_log_likelihoods(losses, shown.prompts) == [
        [-3.0, -2.5, -2.25, -3.0],
        [-0.4, -0.3, -0.1, -0.2],
    ]
    answers = Answers(LETTERS)
    answers.add(shown, torch.zeros(0, VOCAB), losses)
    assert answers.chosen("forget", "cloze", 2) == [2, 2]
    assert answers.by_text["forget", "cloze", 0]["per_token"] == 3  # -1 a token
    assert set(answers.by_text["forget", "cloze", 1].values()) == {2}
    asked = batch(prompt("forget", "chat", 0), prompt("forget", "plain", 0))
    answers.add(asked, torch.stack([logits(_11=5.0)] * 2), torch.zeros(0))
    found = answers.accuracy("forget", [question(2)])
    assert found.measured == {"chat": 0.0, "plain": 0.0, "cloze": 1.0}


def test_letters_of_a_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path))
    letters = letter_tokens(tokenizer)
    for letter, chat, plain in zip("ABCD", letters.chat, letters.plain, strict=True):
        assert tokenizer.convert_ids_to_tokens(list(chat)) == [letter, f"\u2581{letter}"]
        assert tokenizer.convert_ids_to_tokens(list(plain)) == [f"\u2581{letter}"]


class Splitting:
    """A tokenizer that makes `size` tokens of every text."""

    unk_token_id = 3

    def __init__(self, ids: dict[str, list[int]]) -> None:
        self.ids = ids

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
        assert add_special_tokens is False
        return {"input_ids": self.ids.get(text, [7, 8])}


def test_a_letter_that_is_no_token_is_refused() -> None:
    bare = {letter: [10 + i] for i, letter in enumerate("ABCD")}
    spaced = {f" {letter}": [20 + i] for i, letter in enumerate("ABCD")}
    assert letter_tokens(Splitting({**bare, **spaced})) == LETTERS
    assert letter_tokens(Splitting(spaced)).chat == LETTERS.plain
    with pytest.raises(ModelError, match='no single token for " A"'):
        letter_tokens(Splitting(bare))
    with pytest.raises(ModelError, match='no single token for "C"'):
        letter_tokens(Splitting({**bare, **spaced, "C": [3], " C": [5, 6]}))
