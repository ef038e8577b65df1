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
                f"{name}, row {number}: `{source.field}` is {text!r}; expected a string"
            )
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
        raise DataError(f"{where}: `question` is {question!r}; expected a string that is not empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: `choices` is {choices!r}; expected a list of four strings")
    if len(choices) != len(LETTERS):
        raise DataError(f"{where}: `choices` has {len(choices)} entries; expected four")
    if type(answer) is not int or not 0 <= answer < len(LETTERS):
        raise DataError(f"{where}: `answer` is {answer!r}; expected an index from 0 to 3")
    subject = row.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise DataError(f"{where}: `subject` is {subject!r}; expected a string")
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
        raise DataError(f"{name}, row {number}: is {row!r}; expected a JSON object")
    if field not in row:
        keys = ", ".join(f"`{key}`" for key in row) or "no keys"
        raise DataError(f"{name}, row {number}: has no `{field}`; it has {keys}")
    return row[field]


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
        return source.path, _jsonl_rows(source.path, recipe.local(source.path))
    assert source.dataset is not None
    name = " ".join(part for part in (source.dataset, source.config, source.split) if part)
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: cannot be loaded ({reason}); check the name, the split and the network, "
            "or name a local file with `path`"
        ) from error
