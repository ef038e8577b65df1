"""Questions and texts: read from JSON lines or data sets, every row checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import DataError
from bake.recipe import QuestionSource, Recipe, TextSource

LETTERS = "ABCD"

LONGEST_SHOWN = 200
"""Most characters of a wrong value that an error shows."""

KNOWN_TOPICS = {
    "wmdp-bio": "biology",
    "wmdp-chem": "chemistry",
    "wmdp-cyber": "cybersecurity",
}
"""Topics of sources whose rows carry none, as lm-evaluation-harness names them."""


@dataclass(frozen=True)
class Question:
    """A question with four choices."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int
    """Index of the right choice."""
    topic: str | None
    """What the prompt says the question is about."""
    row: int
    """Row of its source (line of its file), from 1."""


@dataclass(frozen=True)
class Text:
    """A text that is not empty."""

    text: str
    row: int
    """Row of its source (line of its file), from 1."""


def load_questions(source: QuestionSource, recipe: Recipe) -> list[Question]:
    """Every question of a source, in its order.

    Raises:
        DataError: the source is missing or empty, or a row is not a four-choice question; the
            message names the source and the row.
    """
    name, rows = _rows(source, recipe)
    topic = source.topic or _known_topic(source)
    questions = [_question(name, number, row, topic) for number, row in rows]
    if not questions:
        raise DataError(f"{name}: holds no questions; expected at least one row")
    return questions


def load_texts(source: TextSource, recipe: Recipe) -> list[Text]:
    """Every text of a source, in its order; empty ones are left out.

    Raises:
        DataError: the source is missing or empty, or a row lacks the field.
    """
    name, rows = _rows(source, recipe)
    texts = []
    for number, row in rows:
        text = _field(name, number, row, source.field)
        if not isinstance(text, str):
            raise DataError(
                f"{name}, row {number}: `{source.field}` is {_shown(text)}; expected a string"
            )
        _check_whole(f"{name}, row {number}", source.field, text)
        if text.strip():
            texts.append(Text(text, number))
    if not texts:
        raise DataError(f"{name}: holds no text; expected at least one row that is not empty")
    return texts


# --------------------------------------------------------------------------- one row


def _question(name: str, number: int, row: Any, topic: str | None) -> Question:
    question = _field(name, number, row, "question")
    choices = _field(name, number, row, "choices")
    answer = _field(name, number, row, "answer")
    where = f"{name}, row {number}"
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            f"{where}: `question` is {_shown(question)}; expected a string that is not empty"
        )
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: `choices` is {_shown(choices)}; expected a list of four strings")
    if len(choices) != len(LETTERS):
        raise DataError(f"{where}: `choices` has {len(choices)} entries; expected four")
    if type(answer) is not int or not 0 <= answer < len(LETTERS):
        raise DataError(f"{where}: `answer` is {_shown(answer)}; expected an index from 0 to 3")
    subject = row.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise DataError(f"{where}: `subject` is {_shown(subject)}; expected a string")
    _check_whole(where, "question", question)
    _check_whole(where, "choices", *choices)
    _check_whole(where, "subject", subject or "")
    a, b, c, d = choices
    return Question(
        question=question,
        choices=(a, b, c, d),
        answer=answer,
        topic=subject.replace("_", " ") if subject else topic,
        row=number,
    )


def _field(name: str, number: int, row: Any, field: str) -> Any:
    if not isinstance(row, dict):
        raise DataError(f"{name}, row {number}: is {_shown(row)}; expected a JSON object")
    if field not in row:
        keys = ", ".join(f"`{printable(key)}`" for key in row) or "no keys"
        raise DataError(f"{name}, row {number}: has no `{field}`; it has {_short(keys)}")
    return row[field]


def _check_whole(where: str, key: str, *texts: str) -> None:
    """Raise for half a character, which JSON can spell and no tokenizer can read."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: `{key}` holds {_shown(text[error.start])}, half of a surrogate pair; "
                "expected text"
            ) from error


def printable(text: str) -> str:
    """A text on one line, with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _shown(value: Any) -> str:
    """What came, for an error's one line."""
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def _known_topic(source: QuestionSource) -> str | None:
    """By name, for the WMDP sets: the configuration, else the file's or folder's name."""
    named = source.config or Path(source.path or source.dataset or "").stem
    return KNOWN_TOPICS.get(named)


# --------------------------------------------------------------------------- where rows come from


Rows = Iterator[tuple[int, Any]]
"""(number from 1, row); of a file, the number is that of the line."""


def _rows(source: QuestionSource | TextSource, recipe: Recipe) -> tuple[str, Rows]:
    """(what to call the source, its rows)."""
    if source.path is not None:
        name = printable(source.path)
        return name, _jsonl_rows(name, recipe.local(source.path))
    assert source.dataset is not None
    parts = (source.dataset, source.config, source.split)
    name = " ".join(printable(part) for part in parts if part)
    return name, _dataset_rows(name, source.dataset, source.config, source.split, recipe)


def _jsonl_rows(name: str, path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(name, number, line)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}); expected a JSONL file beside the recipe"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is no UTF-8 text ({error.reason}); expected JSONL") from error


def _json_row(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{name}, row {number}: is no JSON ({error}); expected JSONL") from error
    except RecursionError as error:
        raise DataError(f"{name}, row {number}: is nested too deep; expected JSONL") from error


def _dataset_rows(name: str, dataset: str, config: str | None, split: str, recipe: Recipe) -> Rows:
    """Rows of a hub data set, or of a local folder in any layout that `datasets` reads."""
    local = recipe.local(dataset)
    if not local.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        raise DataError(
            f"{name}: no such folder beside the recipe; expected a folder, or a hub id (owner/name)"
        )
    import datasets

    path = str(local) if local.is_dir() else dataset
    try:
        yield from enumerate(datasets.load_dataset(path, config, split=split), 1)
    except Exception as error:  # datasets raises many kinds, network errors among them
        reason = printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise DataError(
            f"{name}: cannot be loaded ({reason}); check the name, the split and the network, "
            "or name a local file with `path`"
        ) from error
