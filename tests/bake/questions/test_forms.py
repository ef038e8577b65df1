from __future__ import annotations

from typing import get_args

import pytest

from bake.questions.forms import FORMS, forms_beside, known_in
from bake.questions.multiple_choice import Question
from bake.questions.orders import orders_in
from bake.recipe import PromptForm

QUESTION = Question(" How many? ", ("one", "two", "three", "four"), 1, "small numbers", row=5)


def test_a_recipe_may_name_every_form_and_no_other() -> None:
    assert tuple(FORMS) == get_args(PromptForm)


def test_the_cloze_form_to_the_letter() -> None:
    """As tasks `mmlu_continuation` of lm-evaluation-harness have it: description and question."""
    text = FORMS["cloze"].text(QUESTION)
    assert text == (
        "The following are questions (with answers) about small numbers.\n\n"
        "Question: How many?\nAnswer:"
    )
    bare = FORMS["cloze"].text(Question("How many?", ("1", "2", "3", "4"), 0, None, row=1))
    assert bare.startswith("The following are questions (with answers).\n\nQuestion:")


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ("chat", "Answer: (B)<end_of_turn>\n"),
        ("plain", "Answer: B\n\n"),
        ("cloze", "Answer: two\n\n"),
    ],
)
def test_a_solved_question_ends_with_what_the_form_takes_for_an_answer(
    form: PromptForm, ending: str
) -> None:
    assert FORMS[form].solved(QUESTION).endswith(ending)
    assert FORMS[form].solved(QUESTION).startswith(FORMS[form].text(QUESTION))
    assert FORMS[form].text(QUESTION).startswith(FORMS[form].turn)


def test_cloze_is_measured_where_it_leads() -> None:
    assert forms_beside(None) == forms_beside("plain") == ("chat", "plain")
    assert forms_beside("cloze") == ("chat", "plain", "cloze")
    assert [known_in(form) for form in FORMS] == ["chat", "chat", "cloze"]


def test_the_order_of_choices_means_nothing_where_they_are_not_listed() -> None:
    assert [len(orders_in(QUESTION, form)) for form in FORMS] == [24, 24, 1]
    assert orders_in(QUESTION, "cloze") == [QUESTION]
