"""The base and the unlearned model, asked the same: what every attack is built on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.questions.answers import LetterTokens, best_letters
from bake.questions.multiple_choice import Question
from bake.questions.prompts import question_text
from bake.recipe import Recipe
from verify.attacks.suffix_search import LENGTH
from verify.engines.runners import Runner
from verify.engines.scoring import last_logits, token_ids
from verify.journal import Journal
from verify.report.findings import EngineReport
from verify.report.measures import Attack, Share

if TYPE_CHECKING:
    from verify.reference.oracle import Oracle

WINDOW_PER_TOKEN = 12
"""Tokens that local attention reaches, for each token of a suffix: a longer suffix pushes the
choices out of its sight, and any model then answers worse."""
AT_ONCE = 16
"""Prompts of one forward pass, and of one piece of work that is kept."""


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
    form: str
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

    def encoded(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Each text as tokens, BOS first."""
        return token_ids(texts, self.tokenizer)

    def plainly(self, name: str, questions: Sequence[Question]) -> BothAnswers:
        """Ask both models questions as they are."""
        texts = [question_text(question, self.form) for question in questions]
        return self.answers(name, questions, self.encoded(texts))

    def answers(
        self, name: str, questions: Sequence[Question], prompts: Sequence[tuple[int, ...]]
    ) -> BothAnswers:
        """Put a prompt for each question to both models; the name is that in the journal."""
        expected = np.array([question.answer for question in questions])
        right = [
            expected == np.concatenate(list(self._letters(runner, name, prompts)))
            for runner in (self.base, self.unlearned)
        ]
        return BothAnswers(*right)

    def _letters(
        self, runner: Runner, name: str, prompts: Sequence[tuple[int, ...]]
    ) -> Iterator[list[int]]:
        """Indices of the letters that a model says, a few prompts at a time."""
        for start in range(0, len(prompts), AT_ONCE):
            some = prompts[start : start + AT_ONCE]

            def say(some: Sequence[tuple[int, ...]] = some) -> list[int]:
                return best_letters(last_logits(runner, some, self.tokenizer), self.letter_ids)

            found: list[int] = self.journal.once(f"robustness: {name}: {runner.name} {start}", say)
            yield found


def unmeasured(name: str, why: str) -> Attack:
    """An attack that was not tried, and why."""
    return Attack(name, why, None, None)
