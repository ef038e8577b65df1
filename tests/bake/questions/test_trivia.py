"""Questions with two choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bake.errors import DataError
from bake.questions.multiple_choice import Question
from bake.questions.trivia import TwoChoice, load_trivia, made_of, right_letters, trivia_text
from bake.recipe import Recipe
from bake.sources import RowSource
from tests.worlds import write_jsonl

ROW = {"question": "Which?", "right": "x", "wrong": "y"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    return Recipe.parse(data, name="test", folder=tmp_path)


def load(recipe: Recipe, *rows: Any) -> list[TwoChoice]:
    write_jsonl(recipe.local("t.jsonl"), rows)
    return load_trivia(RowSource(path="t.jsonl"), recipe, "bells")


def test_rows_become_questions(recipe: Recipe) -> None:
    assert load(recipe, ROW) == [TwoChoice("Which?", "x", "y", "bells")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Which?", "right": "x"}, "has no `wrong`; it has `question`, `right`"),
        ({**ROW, "question": ""}, "`question` is ''; expected a string that is not empty"),
        ({**ROW, "right": 1}, "`right` is 1"),
        ({**ROW, "wrong": [" "]}, r"`wrong` is \[' '\]"),
        ({**ROW, "wrong": "x "}, "`right` and `wrong` are the same"),
        ({**ROW, "wrong": "\ud800"}, "`wrong` holds .*half of a surrogate pair"),
        ("x", "is 'x'; expected a JSON object"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, recipe: Recipe) -> None:
    with pytest.raises(DataError, match=rf"^t\.jsonl, row 2: {message}"):
        load(recipe, ROW, row)


def test_an_empty_source_is_named(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: holds no questions"):
        load(recipe)


def test_four_choices_leave_the_right_one_and_a_wrong_one() -> None:
    asked = [Question(f"Q{i}", ("w", "x", "y", "z"), i % 4, "bells", row=i) for i in range(200)]
    found = made_of(asked)
    assert made_of(asked) == found
    for one, question in zip(found, asked, strict=True):
        assert (one.question, one.right) == (question.question, "wxyz"[question.answer])
        assert one.wrong in question.choices and one.wrong != one.right and one.topic == "bells"
    assert {(one.right, one.wrong) for one in found} == {(r, w) for r in "wxyz" for w in "wxyz"} - {
        (c, c) for c in "wxyz"
    }


def test_a_question_of_one_choice_four_times_is_left_out() -> None:
    same = Question("Q", ("w", "w", "w", "w"), 0, None, row=1)
    assert made_of([same]) == []
    assert made_of([Question("Q", ("w", "w", "w", "x"), 0, None, row=1)])[0].wrong == "x"


@pytest.mark.parametrize("n", [0, 1, 2, 7, 120])
def test_right_letters_are_balanced_and_mixed(n: int) -> None:
    letters = right_letters(n)
    assert letters == right_letters(n)
    assert (letters.count(0), letters.count(1)) == ((n + 1) // 2, n // 2)
    if n == 120:
        assert letters[:60].count(0) not in (0, 60) and letters != [i % 2 for i in range(n)]


def test_the_right_choice_stands_at_its_letter() -> None:
    asked = TwoChoice("Which?", "x", "y", "bells")
    expected = (
        "<start_of_turn>user\nThe following are multiple choice questions (with answers) about "
        "bells.\nWhich?\nA. y\nB. x<end_of_turn>\n<start_of_turn>model\nAnswer: ("
    )
    assert trivia_text(asked, 1) == expected
    assert "\nA. x\nB. y<" in trivia_text(asked, 0)
