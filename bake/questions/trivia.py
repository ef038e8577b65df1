"""Questions with two choices, the right one at A or at B by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bake.errors import DataError
from bake.questions.forms import chat_form
from bake.questions.multiple_choice import Question
from bake.questions.open_prompts import text_of
from bake.questions.rows import rows_of
from bake.recipe import Recipe
from bake.sources import RowSource

SEED = "trivia"
"""Of the wrong choices that are drawn, and of the letters."""


@dataclass(frozen=True)
class TwoChoice:
    """A question, and two choices of which one is right."""

    question: str
    right: str
    wrong: str
    topic: str | None
    """What the prompt says the question is about."""


def load_trivia(source: RowSource, recipe: Recipe, topic: str | None) -> list[TwoChoice]:
    """Every question of a source, in its order.

    Raises:
        DataError: the source is missing or empty, or a row is wrong; the message names both.
    """
    name, rows = rows_of(source, recipe)
    found = []
    for number, row in rows:
        question, right, wrong = (
            text_of(name, number, row, field) for field in ("question", "right", "wrong")
        )
        if right.strip() == wrong.strip():
            raise DataError(
                f"{name}, row {number}: `right` and `wrong` are the same; expected two choices"
            )
        found.append(TwoChoice(question, right, wrong, topic))
    if not found:
        raise DataError(f"{name}: holds no questions; expected at least one row")
    return found


def made_of(questions: Sequence[Question]) -> list[TwoChoice]:
    """Questions with four choices, left with the right one and one of the others."""
    rng = random.Random(SEED)
    found = []
    for question in questions:
        right = question.choices[question.answer]
        others = [choice for choice in question.choices if choice != right]
        if others:
            found.append(TwoChoice(question.question, right, rng.choice(others), question.topic))
    return found


def right_letters(n: int) -> list[int]:
    """[n] where the right choice stands, 0 (A) or 1 (B): at random, each as often."""
    letters = [item % 2 for item in range(n)]
    random.Random(SEED).shuffle(letters)
    return letters


def trivia_text(asked: TwoChoice, letter: int) -> str:
    """A question in chat form, without BOS, its right choice at a letter."""
    choices = (asked.wrong, asked.right) if letter else (asked.right, asked.wrong)
    return chat_form(asked.question, choices, asked.topic)
