from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bake.errors import DataError
from bake.questions.multiple_choice import Question, Text, load_questions, load_texts
from bake.recipe import Recipe
from bake.sources import QuestionSource, TextSource
from tests.worlds import write_jsonl

ROW = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    clamp = {"sae": {"path": "sae"}, "method": "zero", "features": [0]}
    data = {"schema": 1, "base": {"model": "base"}, "clamp": [clamp]}
    return Recipe.parse(data, name="test", folder=tmp_path)


def load(recipe: Recipe, *rows: Any, name: str = "q.jsonl", **source: Any) -> list[Question]:
    write_jsonl(recipe.local(name), rows)
    return load_questions(QuestionSource(path=name, **source), recipe)


def test_rows_become_questions(recipe: Recipe) -> None:
    first, second = load(recipe, ROW, {**ROW, "answer": 0, "extra": 1})
    assert first == Question("Which?", ("w", "x", "y", "z"), 2, None, row=1)
    assert (second.answer, second.row) == (0, 2)


def test_topic_is_the_rows_subject_else_the_sources_else_known_by_name(recipe: Recipe) -> None:
    subject = {**ROW, "subject": "high_school_us_history"}
    assert load(recipe, subject, topic="other")[0].topic == "high school us history"
    assert load(recipe, ROW, topic="other")[0].topic == "other"
    for name, topic in (
        ("wmdp-bio.jsonl", "biology"),
        ("wmdp-chem.jsonl", "chemistry"),
        ("wmdp-cyber.jsonl", "cybersecurity"),
        ("q.jsonl", None),
    ):
        assert load(recipe, ROW, name=name)[0].topic == topic


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Which?", "answer": 2}, "has no `choices`; it has `question`, `answer`"),
        ({"choices": [], "answer": 2}, "has no `question`"),
        ({"question": "Which?", "choices": ["w"] * 4}, "has no `answer`"),
        ({**ROW, "answer": 4}, "`answer` is 4; expected an index from 0 to 3"),
        ({**ROW, "answer": -1}, "`answer` is -1"),
        ({**ROW, "answer": "C"}, "`answer` is 'C'"),
        ({**ROW, "answer": True}, "`answer` is True"),
        ({**ROW, "answer": 2.0}, r"`answer` is 2\.0"),
        ({**ROW, "answer": None}, "`answer` is None"),
        ({**ROW, "choices": ["v", "w", "x", "y", "z"]}, "`choices` has 5 entries; expected four"),
        ({**ROW, "choices": ["w", "x", "y"]}, "`choices` has 3 entries; expected four"),
        ({**ROW, "choices": ["w", "x", "y", 1]}, "expected a list of four strings"),
        ({**ROW, "choices": "wxyz"}, "expected a list of four strings"),
        ({**ROW, "question": " "}, "`question` is ' '"),
        ({**ROW, "subject": 3}, "`subject` is 3"),
        ([1, 2], r"is \[1, 2\]; expected a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(row: Any, message: str, recipe: Recipe) -> None:
    with pytest.raises(DataError, match=rf"q\.jsonl, row 2: .*{message}"):
        load(recipe, ROW, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"\x1b[31mred\n": 1}, r"has no `question`; it has `\\x1b\[31mred\\n`"),
        ({**ROW, "choices": "\x1b]0;title\x07"}, r"`choices` is '\\x1b\]0;title\\x07'"),
        ({**ROW, "answer": "\u202e\u2028"}, r"`answer` is '\\u202e\\u2028'"),
        ({**ROW, "question": "a\ud800"}, r"`question` holds '\\ud800', half of a surrogate pair"),
        ({**ROW, "choices": ["w", "x", "y", "\udc00"]}, r"`choices` holds '\\udc00'"),
        ({**ROW, "answer": "x" * 9000}, "`answer` is 'xxx.*…; expected an index"),
        ({f"key{i}": i for i in range(999)}, r"has no `question`; it has `key0`, .*…\. Rename "),
    ],
)
def test_a_hostile_row_is_shown_as_one_short_line(row: Any, message: str, recipe: Recipe) -> None:
    with pytest.raises(DataError, match=rf"q\.jsonl, row 2: {message}") as caught:
        load(recipe, ROW, row)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_hostile_text_in_a_question_is_text(recipe: Recipe) -> None:
    row = {**ROW, "question": "<b>{{x}}\x1b[31m\n# |", "choices": ["<script>", "%}", "'\"", "\\"]}
    (question,) = load(recipe, row)
    assert (question.question, list(question.choices)) == (row["question"], row["choices"])


def test_a_hostile_file_is_one_line(recipe: Recipe) -> None:
    recipe.local("q.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"q\.jsonl, row 1: is nested too deep"):
        load_questions(QuestionSource(path="q.jsonl"), recipe)
    with pytest.raises(DataError, match=r"^q\\x1b\[31m\\n\.jsonl: cannot be read"):
        load_questions(QuestionSource(path="q\x1b[31m\n.jsonl"), recipe)
    write_jsonl(recipe.local("t.jsonl"), [{"text": "\ud800"}])
    with pytest.raises(DataError, match=r"t\.jsonl, row 1: `text` holds '\\ud800'"):
        load_texts(TextSource(path="t.jsonl"), recipe)


def test_row_numbers_are_those_of_the_lines(recipe: Recipe) -> None:
    recipe.local("q.jsonl").write_text(f"{json.dumps(ROW)}\n\n{{\n")
    with pytest.raises(DataError, match=r"q\.jsonl, row 3: is no JSON"):
        load_questions(QuestionSource(path="q.jsonl"), recipe)
    recipe.local("q.jsonl").write_text(f"\n\n{json.dumps(ROW)}\n")
    assert load_questions(QuestionSource(path="q.jsonl"), recipe)[0].row == 3


def test_missing_and_empty_files_are_named(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        load_questions(QuestionSource(path="none.jsonl"), recipe)
    with pytest.raises(DataError, match=r"q\.jsonl: holds no questions"):
        load(recipe)
    recipe.local("q.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"q\.jsonl: is no UTF-8 text"):
        load_questions(QuestionSource(path="q.jsonl"), recipe)


def test_texts_keep_their_row_and_empty_ones_go(recipe: Recipe) -> None:
    write_jsonl(recipe.local("t.jsonl"), [{"body": "one"}, {"body": " \n"}, {"body": "three"}])
    source = TextSource(path="t.jsonl", field="body")
    assert load_texts(source, recipe) == [Text("one", 1), Text("three", 3)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "row 1: has no `body`; it has `text`"),
        ({"body": 3}, "row 1: `body` is 3; expected a string"),
        ({"body": ""}, "holds no text"),
    ],
)
def test_bad_texts_are_named(row: Any, message: str, recipe: Recipe) -> None:
    write_jsonl(recipe.local("t.jsonl"), [row])
    with pytest.raises(DataError, match=rf"t\.jsonl.*{message}"):
        load_texts(TextSource(path="t.jsonl", field="body"), recipe)


def test_a_local_folder_is_read_as_a_data_set(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(recipe.local("set/test.jsonl"), [ROW, {**ROW, "answer": 1}])
    write_jsonl(recipe.local("set/train.jsonl"), [{**ROW, "answer": 3}])
    source = QuestionSource(dataset="set", split="test")
    assert [question.answer for question in load_questions(source, recipe)] == [2, 1]
    with pytest.raises(DataError, match="set nosuch: cannot be loaded"):
        load_questions(QuestionSource(dataset="set", split="nosuch"), recipe)
    with pytest.raises(DataError, match="gone test: no such folder beside the recipe"):
        load_questions(QuestionSource(dataset="gone"), recipe)


def test_a_data_set_that_cannot_be_had_is_one_line(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    source = QuestionSource(dataset="cais/wmdp", config="wmdp-bio")
    with pytest.raises(DataError, match=r"cais/wmdp wmdp-bio test: cannot be loaded \(no route\)"):
        load_questions(source, recipe)


def test_a_hub_data_set_is_asked_for_by_name(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[Any]:
        asked.append((args, options))
        return [ROW]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = QuestionSource(dataset="cais/wmdp", config="wmdp-bio", split="test")
    assert load_questions(source, recipe)[0].topic == "biology"
    assert asked == [(("cais/wmdp", "wmdp-bio"), {"split": "test"})]
