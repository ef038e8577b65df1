"""Questions and texts: read from files or data sets, every row checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import DataError, shown
from bake.questions.rows import check_whole, field_of, rows_of
from bake.recipe import Recipe
from bake.sources import QuestionSource, TextSource

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
    name, rows = rows_of(source, recipe)
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
    name, rows = rows_of(source, recipe)
    texts = []
    for number, row in rows:
        text = field_of(name, number, row, source.field)
        if getattr(source, "chat", False) and isinstance(text, list):
            messages = (m if isinstance(m, dict) else {} for m in text)
            text = "\n".join(str(message.get("content", "")) for message in messages)
        if not isinstance(text, str):
            raise DataError(
                f"{name}, row {number}: `{source.field}` is {shown(text)}; expected a string"
            )
        check_whole(f"{name}, row {number}", source.field, text)
        if text.strip():
            texts.append(Text(text, number))
    if not texts:
        raise DataError(f"{name}: holds no text; expected at least one row that is not empty")
    return texts


# --------------------------------------------------------------------------- one row


def _question(name: str, number: int, row: Any, topic: str | None) -> Question:
    question = field_of(name, number, row, "question")
    choices = field_of(name, number, row, "choices")
    answer = field_of(name, number, row, "answer")
    where = f"{name}, row {number}"
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            f"{where}: `question` is {shown(question)}; expected a string that is not empty"
        )
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: `choices` is {shown(choices)}; expected a list of four strings")
    if len(choices) != len(LETTERS):
        raise DataError(f"{where}: `choices` has {len(choices)} entries; expected four")
    if type(answer) is not int or not 0 <= answer < len(LETTERS):
        raise DataError(f"{where}: `answer` is {shown(answer)}; expected an index from 0 to 3")
    subject = row.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise DataError(f"{where}: `subject` is {shown(subject)}; expected a string")
    check_whole(where, "question", question)
    check_whole(where, "choices", *choices)
    check_whole(where, "subject", subject or "")
    a, b, c, d = choices
    return Question(
        question=question,
        choices=(a, b, c, d),
        answer=answer,
        topic=subject.replace("_", " ") if subject else topic,
        row=number,
    )


def _known_topic(source: QuestionSource) -> str | None:
    """By name, for the WMDP sets: the configuration, else the file's or folder's name."""
    named = source.config or Path(source.path or source.dataset or "").stem
    return KNOWN_TOPICS.get(named)
