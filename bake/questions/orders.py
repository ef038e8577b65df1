"""The 24 orders in which a question's four choices can stand, where they are listed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from bake.questions.forms import FORMS
from bake.questions.multiple_choice import LETTERS, Question
from bake.recipe import PromptForm

ORDERS = tuple(itertools.permutations(range(len(LETTERS))))
"""Per order, which choice stands at A, at B, at C and at D; the first is as written."""


def in_order(question: Question, order: Sequence[int]) -> Question:
    """The same question with its choices in another order."""
    a, b, c, d = (question.choices[choice] for choice in order)
    return replace(question, choices=(a, b, c, d), answer=order.index(question.answer))


def all_orders(question: Question) -> list[Question]:
    """[24] the question in every order."""
    return [in_order(question, order) for order in ORDERS]


def orders_in(question: Question, form: PromptForm) -> list[Question]:
    """[24] the question in every order; [1] as it is, in a form in which order has no meaning."""
    return all_orders(question) if FORMS[form].letters else [question]
