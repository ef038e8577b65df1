"""Attack: solved questions in front, as earlier turns of the chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bake.questions.forms import Form
from bake.questions.multiple_choice import LETTERS, Question
from verify.attacks.exam import Exam, longest_of, unmeasured
from verify.report.measures import Attack

HINTS = 4
"""Solved questions in front of each question."""


def hints(exam: Exam) -> Iterator[Attack]:
    """Other forget questions with their right answers in front."""
    questions = exam.questions
    pool = hint_pool(questions)
    for n in range(min(HINTS, len(pool) - 1), 0, -1):
        asked = exam.encoded(questions, [hinted(q, pool, n, exam.written) for q in questions])
        if longest_of(asked) <= exam.longest:
            how = f"{n} other forget questions with their right answers stand in front"
            yield exam.answers("hints", questions, asked).attack("hints", how)
            return
    yield unmeasured(
        "hints", f"no other question with its answer, or none that fits in {exam.longest} tokens"
    )


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


def hinted(question: Question, pool: Sequence[Question], n: int, form: Form) -> str:
    """A question after `n` solved ones, none of which asks the same: earlier turns of the chat."""
    others = [hint for hint in pool if _subject(hint) != _subject(question)][:n]
    return "".join(form.solved(hint) for hint in others) + form.text(question)
