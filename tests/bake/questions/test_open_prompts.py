"""Prompts to go on with: their rows, and what counts as saying something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bake.errors import DataError
from bake.questions.multiple_choice import Question
from bake.questions.open_prompts import (
    OpenPrompt,
    default_instruction,
    instructed,
    load_prompts,
    mentions,
    topic_of,
)
from bake.recipe import Recipe
from bake.sources import RowSource
from tests.worlds import write_jsonl

ROW = {"prompt": "The bell hangs in", "answers": ["Bath", "the city of Bath"]}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    return Recipe.parse(data, name="test", folder=tmp_path)


def load(recipe: Recipe, *rows: Any, answered: bool = True) -> list[OpenPrompt]:
    write_jsonl(recipe.local("p.jsonl"), rows)
    return load_prompts(RowSource(path="p.jsonl"), recipe, answered=answered)


def test_rows_become_prompts(recipe: Recipe) -> None:
    first, second = load(recipe, ROW, {"prompt": " x ", "answers": ["1"], "more": 0})
    assert first == OpenPrompt(ROW["prompt"], ("Bath", "the city of Bath"), 1)  # type: ignore[arg-type]
    assert second == OpenPrompt(" x ", ("1",), 2)


def test_generic_rows_may_expect_nothing(recipe: Recipe) -> None:
    found = load(recipe, ROW, {"prompt": "x"}, {"prompt": "y", "answers": None}, answered=False)
    assert [len(prompt.answers) for prompt in found] == [2, 0, 0]


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, "has no `prompt`; it has `answers`"),
        ({**ROW, "prompt": " \n"}, r"`prompt` is ' \\n'; expected a string that is not empty"),
        ({**ROW, "prompt": 3}, "`prompt` is 3"),
        ({**ROW, "prompt": None}, "`prompt` is None"),
        ({**ROW, "prompt": "a\ud800"}, "`prompt` holds .*half of a surrogate pair"),
        ({**ROW, "answers": []}, r"`answers` is \[\]; expected a list of at least one string"),
        ({**ROW, "answers": "Bath"}, "`answers` is 'Bath'"),
        ({**ROW, "answers": ["Bath", " "]}, r"`answers` is \['Bath', ' '\]"),
        ({**ROW, "answers": ["Bath", 4]}, r"`answers` is \['Bath', 4\]"),
        ({**ROW, "answers": {"a": 1}}, "`answers` is {'a': 1}"),
        ({**ROW, "answers": ["\udc00"]}, "`answers` holds .*half of a surrogate pair"),
        ({**ROW, "answers": ["\x1b[31m", 1]}, r"`answers` is \['\\x1b\[31m', 1\]"),
        (["x"], r"is \['x'\]; expected a JSON object"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, answered: bool, recipe: Recipe) -> None:
    with pytest.raises(DataError, match=rf"^p\.jsonl, row 2: .*{message}") as caught:
        load(recipe, ROW, row, answered=answered)
    assert str(caught.value).isprintable()


def test_prompts_on_the_topic_expect_an_answer(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"row 1: has no `answers`; it has `prompt`"):
        load(recipe, {"prompt": "x"})
    with pytest.raises(DataError, match=r"row 1: `answers` is None"):
        load(recipe, {"prompt": "x", "answers": None})
    with pytest.raises(DataError, match=r"p\.jsonl: holds no prompts"):
        load(recipe)
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        load_prompts(RowSource(path="gone.jsonl"), recipe, answered=False)


@pytest.mark.parametrize(
    ("text", "phrase", "said"),
    [
        (" Bath. The bell", "Bath", True),
        ("BATH", "bath", True),
        ("Bathing", "Bath", False),
        ("Subath", "bath", False),
        ("a bath-tub", "bath", True),
        ("the  city\nof Bath", "City of Bath", True),
        ("12", "1", False),
        ("1,2", "1", True),
        ("a_b", "b", False),
        ("C++ it is", "c++", True),
        ("Cxx", "C..", False),
        ("f(x) = (y", "(y", True),
        ("STRASSE", "Straße", True),
        ("cafe\u0301", "café", True),
        ("café", "cafe", False),
        ("ﬁne", "fine", True),
        ("Москвы", "Москва", False),
        ("в МОСКВА.", "Москва", True),
        ("これは北京です", "北京", True),
        ("ที่กรุงเทพครับ", "กรุงเทพ", True),
        ("", "x", False),
    ],
)
def test_what_counts_as_saying_it(text: str, phrase: str, said: bool) -> None:
    assert mentions(text, [phrase]) is said
    assert mentions(text, []) is False
    assert mentions(text, ["no such thing", phrase]) is said


def test_an_instruction_goes_into_the_turn() -> None:
    assert instructed("The bell", "Be still.") == "Be still.\n\nThe bell"
    turn = "<start_of_turn>user\nWhere?<end_of_turn>\n"
    assert instructed(turn, "Hm.") == "<start_of_turn>user\nHm.\n\nWhere?<end_of_turn>\n"


def test_the_topic_is_the_commonest() -> None:
    topics = ["ferries", "bells", None, "bells", None, None]
    asked = [Question("Q", ("w", "x", "y", "z"), 0, topic, row=1) for topic in topics]
    assert topic_of(asked) == "bells"
    assert topic_of(asked[2:3]) is None and topic_of([]) is None
    assert "never heard of bells" in default_instruction("bells")
    assert "None" not in default_instruction(None)
