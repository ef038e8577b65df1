"""The base and the unlearned model, asked the same: what every attack is built on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.questions.answers import LetterTokens
from bake.questions.forms import FORMS, Form
from bake.questions.multiple_choice import Question
from bake.questions.prompts import Prompt, asking
from bake.recipe import PromptForm, Recipe
from verify.attacks.suffix_search import LENGTH
from verify.engines.runners import Runner
from verify.engines.scoring import choices_made
from verify.journal import Journal
from verify.report.findings import EngineReport
from verify.report.measures import Attack, Share

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle

WINDOW_PER_TOKEN = 12
"""Tokens that local attention reaches, for each token of a suffix: a longer suffix pushes the
choices out of its sight, and any model then answers worse."""
AT_ONCE = 16
"""Questions of one piece of work that is kept."""


@dataclass(frozen=True)
class BothAnswers:
    """What both models said to the same prompts."""

    base: np.ndarray
    """[questions] bool: right."""
    unlearned: np.ndarray
    """[questions] bool: right."""

    def shares(self, rows: Sequence[int] | slice = slice(None)) -> tuple[Share, Share]:
        """(the base's, the unlearned model's) over some of the questions, or all."""
        base, unlearned = self.base[rows], self.unlearned[rows]
        return Share(int(base.sum()), len(base)), Share(int(unlearned.sum()), len(unlearned))

    def attack(self, name: str, how: str) -> Attack:
        """As an attack on all of the questions."""
        return Attack(name, how, *self.shares())


@dataclass(frozen=True)
class Exam:
    """Two models, and how they are asked."""

    recipe: Recipe
    """With a `[verify]` table."""
    questions: Sequence[Question]
    """Its forget questions."""
    engines: Sequence[EngineReport]
    """What was measured of all engines."""
    budget: int
    """Steps of the suffix search; 0 leaves it out."""
    progress: Callable[[float], None]
    """Told the share of one attack that is done, 0 to 1."""
    form: PromptForm
    base: Runner
    unlearned: Runner
    oracle: Oracle
    tokenizer: Any
    letters: LetterTokens
    journal: Journal

    @cached_property
    def asked(self) -> BothAnswers:
        """What both say to the questions as they are."""
        return self.plainly("as asked", self.questions)

    @property
    def written(self) -> Form:
        """How questions are written in the form that leads."""
        return FORMS[self.form]

    @property
    def letter_ids(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of A to D in the form that leads."""
        ids: tuple[tuple[int, ...], ...] = getattr(self.letters, self.form)
        return ids

    @property
    def longest(self) -> int:
        """Most tokens of a prompt that the model has positions for."""
        return int(self.oracle.model.config.get_text_config().max_position_embeddings)

    @property
    def suffix_length(self) -> int:
        """Tokens of a suffix that leaves the question in sight."""
        config = self.oracle.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or self.longest
        return int(max(1, min(LENGTH, window // WINDOW_PER_TOKEN)))

    def encoded(
        self, questions: Sequence[Question], texts: Sequence[str]
    ) -> list[Sequence[Prompt]]:
        """Per question, what asks it with a text in place of its own."""
        found: list[Sequence[Prompt]] = []
        for question, text in zip(questions, texts, strict=True):
            at = Prompt("forget", self.form, question.row, (), every_token=False)
            found.append(asking(text, question, self.tokenizer, at))
        return found

    def as_tokens(self, ids: tuple[int, ...]) -> list[Prompt]:
        """What asks for a letter after some tokens, BOS first."""
        return [Prompt("forget", self.form, 0, ids, every_token=False)]

    def plainly(self, name: str, questions: Sequence[Question]) -> BothAnswers:
        """Ask both models questions as they are."""
        texts = [self.written.text(question) for question in questions]
        return self.answers(name, questions, self.encoded(questions, texts))

    def answers(
        self, name: str, questions: Sequence[Question], asked: Sequence[Sequence[Prompt]]
    ) -> BothAnswers:
        """Put what asks each question to both models; the name is that in the journal."""
        expected = np.array([question.answer for question in questions])
        right = [
            expected == np.concatenate(list(self._made(runner, name, asked)))
            for runner in (self.base, self.unlearned)
        ]
        return BothAnswers(*right)

    def _made(
        self, runner: Runner, name: str, asked: Sequence[Sequence[Prompt]]
    ) -> Iterator[list[int]]:
        """Indices of the choices that a model makes, a few questions at a time."""
        for start in range(0, len(asked), AT_ONCE):
            some = asked[start : start + AT_ONCE]

            def make(some: Sequence[Sequence[Prompt]] = some) -> list[int]:
                return choices_made(runner, some, self.letters, self.tokenizer)

            found: list[int] = self.journal.once(f"robustness: {name}: {runner.name} {start}", make)
            yield found


def longest_of(asked: Sequence[Sequence[Prompt]]) -> int:
    """Tokens of the longest prompt."""
    return max(len(prompt.ids) for of in asked for prompt in of)


def unmeasured(name: str, why: str) -> Attack:
    """An attack that was not tried, and why."""
    return Attack(name, why, None, None)
