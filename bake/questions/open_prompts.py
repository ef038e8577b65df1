"""Prompts that a model goes on with, what is expected of it, and whether a text says that."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bake.errors import DataError, shown
from bake.questions.forms import USER_TURN
from bake.questions.multiple_choice import Question
from bake.questions.rows import check_whole, field_of, rows_of
from bake.recipe import Recipe
from bake.sources import RowSource


@dataclass(frozen=True)
class OpenPrompt:
    """The beginning of a text."""

    prompt: str
    """As it is put to the model, without BOS; it may hold chat turns."""
    answers: tuple[str, ...]
    """Any of them is right; none where nothing is expected."""
    row: int
    """Row of its source (line of its file), from 1."""


def load_prompts(source: RowSource, recipe: Recipe, *, answered: bool) -> list[OpenPrompt]:
    """Every prompt of a source, in its order.

    Args:
        source: rows with `prompt` and `answers`.
        recipe: where relative paths start.
        answered: whether a row must have `answers`.

    Raises:
        DataError: the source is missing or empty, or a row is wrong; the message names both.
    """
    name, rows = rows_of(source, recipe)
    prompts = [_prompt(name, number, row, answered) for number, row in rows]
    if not prompts:
        raise DataError(f"{name}: holds no prompts; expected at least one row")
    return prompts


def _prompt(name: str, number: int, row: Any, answered: bool) -> OpenPrompt:
    where = f"{name}, row {number}"
    prompt = text_of(name, number, row, "prompt")
    answers = field_of(name, number, row, "answers") if answered else row.get("answers")
    if answers is None and not answered:
        return OpenPrompt(prompt, (), number)
    texts = isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)
    if not texts or not answers:
        raise DataError(
            f"{where}: `answers` is {shown(answers)}; expected a list of at least one string, none "
            "of them empty"
        )
    check_whole(where, "answers", *answers)
    return OpenPrompt(prompt, tuple(answers), number)


def text_of(name: str, number: int, row: Any, field: str) -> str:
    """A row's field that must be text.

    Raises:
        DataError: it is missing, no string, empty, or holds half a character.
    """
    text = field_of(name, number, row, field)
    where = f"{name}, row {number}"
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: `{field}` is {shown(text)}; expected a string that is not empty")
    check_whole(where, field, text)
    return text


# --------------------------------------------------------------------------- telling the base


def topic_of(questions: Sequence[Question]) -> str | None:
    """What most questions are about; the first named of those that are named as often."""
    topics = Counter(question.topic for question in questions if question.topic)
    return topics.most_common(1)[0][0] if topics else None


def default_instruction(topic: str | None) -> str:
    """What to tell a model that is to act as if it had forgotten."""
    about = topic or "what this is about"
    return f"You have never heard of {about}. Say nothing that you know of {about}."


def instructed(prompt: str, instruction: str) -> str:
    """A prompt with an instruction in front: inside its first turn where it starts with one."""
    turn = USER_TURN if prompt.startswith(USER_TURN) else ""
    return f"{turn}{instruction}\n\n{prompt.removeprefix(turn)}"


# --------------------------------------------------------------------------- what a text says


def mentions(text: str, phrases: Iterable[str]) -> bool:
    """Whether a text holds one of some phrases in whole words, upper or lower case.

    Letters of scripts without case need no boundary: many of them are written without spaces.
    """
    folded = _folded(text)
    wanted = (phrase for phrase in map(_folded, phrases) if phrase in folded)
    return any(re.search(_whole_words(phrase), folded) for phrase in wanted)


@lru_cache(maxsize=10_000)
def _folded(text: str) -> str:
    """Caseless, one spelling for each character, and one space between words.

    Source: the Unicode Standard, section 3.13, compatibility caseless match.
    """
    once = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(once.split())


def _whole_words(phrase: str) -> str:
    before = r"(?<!\w)" if _bounded(phrase[0]) else ""
    after = r"(?!\w)" if _bounded(phrase[-1]) else ""
    return f"{before}{re.escape(phrase)}{after}"


def _bounded(character: str) -> bool:
    return character.isalnum() and unicodedata.category(character) != "Lo"
