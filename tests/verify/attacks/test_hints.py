"""Solved questions put before a question: which, how many, and in what order."""

from __future__ import annotations

import re

import pytest

from bake.questions.forms import FORMS
from bake.questions.multiple_choice import Question
from verify.attacks.hints import balanced, hint_pool, hinted

ANSWERS = [0, 0, 0, 3, 1, 1, 2, 0]
QUESTIONS = [
    Question(f"Which is {i}?", (f"w{i}", f"x{i}", f"y{i}", f"z{i}"), answer, "bells", row=i + 1)
    for i, answer in enumerate(ANSWERS)
]
TWIN = Question(" which  IS 3?", ("a", "b", "c", "d"), 2, "bells", row=9)


def test_answers_take_turns() -> None:
    assert balanced(QUESTIONS) == [0, 4, 6, 3, 1, 5, 2, 7]
    assert balanced([]) == []


def test_nothing_is_given_away_twice() -> None:
    pool = hint_pool([*QUESTIONS, TWIN])
    asked = [" ".join(q.question.lower().split()) for q in pool]
    assert len(asked) == len(set(asked)) == len(QUESTIONS)


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_hints_are_others_with_their_right_answers(form: str) -> None:
    everything = [*QUESTIONS, TWIN]
    pool = hint_pool(everything)
    for question in everything:
        text = hinted(question, pool, 4, FORMS[form])
        alone = FORMS[form].text(question)
        assert text.endswith(alone)
        before = text.removesuffix(alone)
        own = re.escape(" ".join(question.question.split()))
        assert not re.search(own, before, re.IGNORECASE)
        ending = r"Answer: \((.)\)<end_of_turn>\n" if form == "chat" else r"Answer: (.)\n\n"
        names = [int(n) for n in re.findall(r"Which is (\d)\?", before)]
        assert len(set(names)) == 4
        right = ["ABCD"[ANSWERS[n]] for n in names]
        assert re.findall(ending, before) == right
        assert len(set(right)) >= 3  # one letter of four is missing where it is the asked one's
        for n in names:
            assert FORMS[form].text(QUESTIONS[n]) in before


def test_a_chat_with_hints_is_turns() -> None:
    text = hinted(QUESTIONS[0], hint_pool(QUESTIONS), 2, FORMS["chat"])
    assert text.count("<start_of_turn>user\n") == text.count("<start_of_turn>model\n") == 3
    assert text.count("<end_of_turn>") == 5
    assert text.endswith("Answer: (")
