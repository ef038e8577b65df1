"""Questions put otherwise than they are asked: after solved ones, or after text about nothing.

Every prompt is in one of the two forms; its answer is the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verify.prompts import USER_TURN, question_text
from verify.questions import LETTERS, Question, Text


def balanced(questions: Sequence[Question]) -> list[int]:
    """Indices of questions, their answers A, B, C, D in turn for as long as there are such.

    What begins this list favours no letter.
    """
    rank = [0] * len(LETTERS)
    turns = []
    for index, question in enumerate(questions):
        turns.append((rank[question.answer], question.answer, index))
        rank[question.answer] += 1
    return [index for _, _, index in sorted(turns)]


def _subject(question: Question) -> str:
    """What a question asks, however it is spaced or capitalised."""
    return " ".join(question.question.split()).casefold()


def hint_pool(questions: Sequence[Question]) -> list[Question]:
    """Questions to give away, in the order in which they are; none that asks the same twice."""
    pool: dict[str, Question] = {}
    for index in balanced(questions):
        pool.setdefault(_subject(questions[index]), questions[index])
    return list(pool.values())


def hinted(question: Question, pool: Sequence[Question], n: int, form: str) -> str:
    """A question after `n` solved ones, none of which asks the same: earlier turns of the chat."""
    others = [hint for hint in pool if _subject(hint) != _subject(question)][:n]
    closing = ")<end_of_turn>\n" if form == "chat" else "\n\n"
    opening = "" if form == "chat" else " "
    solved = [
        f"{question_text(hint, form)}{opening}{LETTERS[hint.answer]}{closing}" for hint in others
    ]
    return "".join(solved) + question_text(question, form)


def text_of_length(texts: Sequence[Text], n: int, tokenizer: Any) -> str:
    """Texts one after another up to `n` tokens, or all there is; nothing of them is special."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= n:
            break
        ids += tokenizer(f"{text.text}\n", add_special_tokens=False)["input_ids"]
    decoded: str = tokenizer.decode(ids[:n], skip_special_tokens=True)
    return decoded.strip()


def padded(question: Question, padding: str, form: str) -> str:
    """A question with text in front of it, inside the same turn."""
    turn = USER_TURN if form == "chat" else ""
    return f"{turn}{padding}\n\n{question_text(question, form).removeprefix(turn)}"
