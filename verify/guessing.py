"""What an accuracy of multiple choice is worth: what guessing gives, at random and without ever
reading the question.

A set of questions whose right choice is the longest one, or the likeliest by itself, is answered
by who knows nothing. Source: O'Brien et al., Deep Ignorance, arXiv 2508.06601, who removed such
questions from WMDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bake.questions.forms import FORMS
from bake.questions.prompts import Prompt, asking
from verify.engines.scoring import choices_made
from verify.report.measures import Guess

if TYPE_CHECKING:
    from verify.work import Work


def guess_of(source: str, choices: Sequence[Sequence[str]], answers: Sequence[int]) -> Guess:
    """What guessing gives on a set of questions.

    Args:
        source: what the set is called.
        choices: of each question.
        answers: indices of the right ones.
    """
    at_random = sum(1 / len(of) for of in choices)
    longest = 0.0
    for of, answer in zip(choices, answers, strict=True):
        most = max(map(len, of))
        of_most = [index for index, choice in enumerate(of) if len(choice) == most]
        longest += (answer in of_most) / len(of_most)
    return Guess(source, len(choices), at_random / len(choices), longest / len(choices))


def together(source: str, guesses: Sequence[Guess]) -> Guess:
    """Several sets as one."""
    n = sum(guess.n for guess in guesses)
    at_random, longest = (
        sum(guess.n * getattr(guess, name) for guess in guesses) / n
        for name in ("at_random", "longest")
    )
    return Guess(source, n, at_random, longest)


def measure_guessing(work: Work) -> tuple[Guess, ...]:
    """Of both sets of questions."""
    found = []
    for source, questions in work.hooked.material.questions.items():
        guess = guess_of(source, [q.choices for q in questions], [q.answer for q in questions])
        right: int = work.journal.shared.once(
            f"guessing: {source}, {work.form}, {len(questions)}", partial(_unasked, work, source)
        )
        found.append(replace(guess, unasked=right / len(questions)))
    return tuple(found)


def _unasked(work: Work, source: str) -> int:
    """On how many questions the base picks the right choice without being shown what is asked."""
    material, form = work.hooked.material, FORMS[work.form]
    questions = material.questions[source]
    asked = [
        asking(
            form.text(replace(question, question="")),
            question,
            material.tokenizer,
            Prompt(source, work.form, question.row, (), every_token=False),
        )
        for question in questions
    ]
    chosen = choices_made(work.hooked.base, asked, material.letters, material.tokenizer)
    return sum(a == question.answer for a, question in zip(chosen, questions, strict=True))
