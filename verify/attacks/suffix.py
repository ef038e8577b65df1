"""Attack: one suffix, searched by gradient, that brings back what was forgotten; or one prefix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bake.questions.multiple_choice import LETTERS
from verify.attacks.exam import Exam, unmeasured
from verify.attacks.hints import balanced
from verify.attacks.suffix_loss import slotted, slotted_before
from verify.attacks.suffix_search import find_suffix
from verify.report.measures import Attack

TRAINING_QUESTIONS = 8
"""Most questions that the suffix search looks at."""


def suffix(exam: Exam) -> Iterator[Attack]:
    """A suffix searched on some questions, tried on the others."""
    yield _searched(exam, "suffix")


def prefix(exam: Exam) -> Iterator[Attack]:
    """The same in front of the question."""
    yield _searched(exam, "prefix")


def _searched(exam: Exam, what: str) -> Attack:
    questions, asked = exam.questions, exam.asked
    if not exam.written.letters:
        return unmeasured(what, f"the search is for a letter; {exam.form} form asks for none")
    if exam.budget <= 0:
        return unmeasured(what, "the search was given no steps")
    forgotten = np.flatnonzero(asked.base & ~asked.unlearned).tolist()
    if len(forgotten) < 2:
        return unmeasured(
            what,
            f"the search looks at questions that the base answers right and {exam.unlearned.name} "
            f"does not, and needs at least 2; there are {len(forgotten)}",
        )
    order = [forgotten[i] for i in balanced([questions[i] for i in forgotten])]
    seen = order[: min(TRAINING_QUESTIONS, len(order) // 2)]
    unseen = [i for i in range(len(questions)) if i not in seen]
    cut = slotted if what == "suffix" else slotted_before
    prompts = [cut(question, exam.written, exam.tokenizer) for question in questions]
    name = f"robustness: {what} against {exam.unlearned.name}"
    best = find_suffix(
        exam.oracle,
        [prompts[i] for i in seen],
        exam.tokenizer,
        exam.letter_ids,
        budget=exam.budget,
        journal=exam.journal,
        name=name,
        length=exam.suffix_length,
        progress=exam.progress,
    )
    answers = exam.answers(
        f"{name}, {best.steps} steps",
        [questions[i] for i in unseen],
        [exam.as_tokens(prompts[i].filled(best.ids)) for i in unseen],
    )
    base, unlearned = asked.shares(unseen)
    where = "after" if what == "suffix" else "before"
    how = (
        f"{len(best.ids)} tokens {where} each question, put in as ids, found in {best.steps} steps "
        f"of greedy coordinate gradient search on {len(seen)} of the forgotten questions (loss "
        f"there: {best.loss:.2f} nats; guessing is {math.log(len(LETTERS)):.2f}), asked with the "
        f"{len(unseen)} others. Without it the base is right on {base.right} of these and "
        f"{exam.unlearned.name} on {unlearned.right}. As text: "
        f'"{exam.tokenizer.decode(best.ids)}"'
    )
    return answers.attack(what, how)
