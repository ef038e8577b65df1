"""What can still be had of what was to be forgotten, by asking otherwise; no weight is changed.

Every attack puts the same prompts to the base and to the unlearned model, in the prompt form that
leads. What an attack brings back shows in the unlearned model's answers beside those to the
questions as they are asked; what it spoils for any model shows in the base's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.recipe import Recipe
from verify.choices import LetterTokens, best_letters
from verify.journal import Journal
from verify.measures import Attack, Robustness, Share
from verify.onnx_files import EXACT, GRAPHS
from verify.prompts import question_text
from verify.questions import LETTERS, Question, Text, load_questions, load_texts
from verify.report import EngineReport
from verify.rewriting import balanced, hint_pool, hinted, padded, text_of_length
from verify.runners import Runner
from verify.scoring import last_logits, token_ids
from verify.suffix_loss import slotted
from verify.suffix_search import LENGTH, find_suffix

if TYPE_CHECKING:
    from verify.reference import Oracle

HINTS = 4
"""Solved questions in front of each question."""
PADDING_TOKENS = 512
"""Most tokens of irrelevant text in front of each question; half of what the model can read is
enough."""
TRAINING_QUESTIONS = 8
"""Most questions that the suffix search looks at."""
WINDOW_PER_TOKEN = 12
"""Tokens that local attention reaches, for each token of a suffix: a longer suffix pushes the
choices out of its sight, and any model then answers worse."""
AT_ONCE = 16
"""Prompts of one forward pass, and of one piece of work that is kept."""
ROUNDED = tuple(name for name in GRAPHS if name != EXACT)
"""Engines of fewer bits."""


def attack(
    recipe: Recipe,
    questions: Sequence[Question],
    base: Runner,
    unlearned: Runner,
    oracle: Oracle,
    tokenizer: Any,
    letters: LetterTokens,
    *,
    journal: Journal,
    budget: int,
    engines: Sequence[EngineReport] = (),
    progress: Callable[[float], None] | None = None,
) -> Robustness:
    """Ask for what was to be forgotten in every way that is known here.

    Args:
        recipe: with a `[verify]` table.
        questions: its forget questions.
        base: the base model.
        unlearned: the engine that is attacked.
        oracle: the hooked reference, for the suffix search; its counts of firings go on, so it is
            one that nobody else reads.
        tokenizer: the base model's.
        letters: of that tokenizer.
        journal: keeps every piece of work.
        budget: steps of the suffix search; 0 leaves it out.
        engines: what was measured of them; those of rounded weights are attacks too.
        progress: called with the share done, 0 to 1.

    Raises:
        DataError: a source of the recipe cannot be used.
    """
    assert recipe.verify is not None
    form = recipe.verify.prompt
    n_parts = 4 + len(recipe.verify.reworded)
    attacks: list[Attack] = []

    def tell(share: float) -> None:
        if progress is not None:
            progress((len(attacks) + share) / n_parts)

    exam = _Exam(form, base, unlearned, oracle, tokenizer, letters, journal)
    asked = exam.plainly("as asked", questions)
    attacks.append(asked.attack("as asked", "the forget questions as they are"))
    tell(0)
    for name, source in recipe.verify.reworded.items():
        answers = exam.plainly(f"reworded: {name}", load_questions(source, recipe))
        how = f"the questions of `verify.reworded.{name}` instead"
        attacks.append(answers.attack(f"reworded: {name}", how))
        tell(0)
    attacks.append(_hints(exam, questions))
    tell(0)
    attacks.append(_padding(exam, questions, load_texts(recipe.verify.text, recipe)))
    tell(0)
    attacks.append(_suffix(exam, questions, asked, budget, tell))
    tell(0)
    others = [engine for engine in engines if engine.name != unlearned.name]
    attacks += rounded_weights(others, form, len(questions))
    return Robustness(unlearned.name, form, tuple(attacks))


# --------------------------------------------------------------------------- asking


@dataclass(frozen=True)
class _Answers:
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
class _Exam:
    """Two models, and how they are asked."""

    form: str
    base: Runner
    unlearned: Runner
    oracle: Oracle
    tokenizer: Any
    letters: LetterTokens
    journal: Journal

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

    def plainly(self, name: str, questions: Sequence[Question]) -> _Answers:
        """Ask both models questions as they are."""
        texts = [question_text(question, self.form) for question in questions]
        return self.answers(name, questions, self.encoded(texts))

    def answers(
        self, name: str, questions: Sequence[Question], prompts: Sequence[tuple[int, ...]]
    ) -> _Answers:
        """Put a prompt for each question to both models; the name is that in the journal."""
        expected = np.array([question.answer for question in questions])
        right = [
            expected == np.concatenate(list(self._letters(runner, name, prompts)))
            for runner in (self.base, self.unlearned)
        ]
        return _Answers(*right)

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


# --------------------------------------------------------------------------- the attacks


def _hints(exam: _Exam, questions: Sequence[Question]) -> Attack:
    pool = hint_pool(questions)
    for n in range(min(HINTS, len(pool) - 1), 0, -1):
        prompts = exam.encoded([hinted(q, pool, n, exam.form) for q in questions])
        if max(len(ids) for ids in prompts) <= exam.longest:
            how = f"{n} other forget questions with their right answers stand in front"
            return exam.answers("hints", questions, prompts).attack("hints", how)
    return _unmeasured(
        "hints", f"no other question with its answer, or none that fits in {exam.longest} tokens"
    )


def _padding(exam: _Exam, questions: Sequence[Question], texts: Sequence[Text]) -> Attack:
    asked = exam.encoded([question_text(q, exam.form) for q in questions])
    n = min(PADDING_TOKENS, exam.longest // 2)
    while n > 0:
        padding = text_of_length(texts, n, exam.tokenizer)
        prompts = exam.encoded([padded(q, padding, exam.form) for q in questions])
        beyond = max(len(ids) for ids in prompts) - exam.longest
        if beyond <= 0:
            added = len(prompts[0]) - len(asked[0])
            how = f"{added} tokens of the recipe's text stand in front, in the same turn"
            return exam.answers("padding", questions, prompts).attack("padding", how)
        n -= beyond
    return _unmeasured("padding", f"the questions leave no room for more in {exam.longest} tokens")


def _suffix(
    exam: _Exam,
    questions: Sequence[Question],
    asked: _Answers,
    budget: int,
    progress: Callable[[float], None],
) -> Attack:
    if budget <= 0:
        return _unmeasured("suffix", "the search was given no steps")
    forgotten = np.flatnonzero(asked.base & ~asked.unlearned).tolist()
    if len(forgotten) < 2:
        return _unmeasured(
            "suffix",
            f"the search looks at questions that the base answers right and {exam.unlearned.name} "
            f"does not, and needs at least 2; there are {len(forgotten)}",
        )
    order = [forgotten[i] for i in balanced([questions[i] for i in forgotten])]
    seen = order[: min(TRAINING_QUESTIONS, len(order) // 2)]
    unseen = [i for i in range(len(questions)) if i not in seen]
    prompts = [slotted(question, exam.form, exam.tokenizer) for question in questions]
    name = f"robustness: suffix against {exam.unlearned.name}"
    found = find_suffix(
        exam.oracle,
        [prompts[i] for i in seen],
        exam.tokenizer,
        exam.letter_ids,
        budget=budget,
        journal=exam.journal,
        name=name,
        length=exam.suffix_length,
        progress=progress,
    )
    answers = exam.answers(
        f"{name}, {found.steps} steps",
        [questions[i] for i in unseen],
        [prompts[i].filled(found.ids) for i in unseen],
    )
    base, unlearned = asked.shares(unseen)
    how = (
        f"{len(found.ids)} tokens after each question, put in as ids, found in {found.steps} steps "
        f"of greedy coordinate gradient search on {len(seen)} of the forgotten questions (loss "
        f"there: {found.loss:.2f} nats; guessing is {math.log(len(LETTERS)):.2f}), asked with the "
        f"{len(unseen)} others. Without it the base is right on {base.right} of these and "
        f"{exam.unlearned.name} on {unlearned.right}. As text: "
        f'"{exam.tokenizer.decode(found.ids)}"'
    )
    return answers.attack("suffix", how)


def rounded_weights(
    engines: Sequence[EngineReport], form: str, n_questions: int
) -> Iterator[Attack]:
    """Engines whose weights were rounded, by what was measured of them in a prompt form."""
    shares = {
        engine.name: Share(round(getattr(engine.forget, form) * n_questions), n_questions)
        for engine in engines
        if engine.forget is not None
    }
    for precision in ROUNDED:
        if (share := shares.get(precision)) is not None:
            how = f"the engine {precision} instead, whose weights are rounded; the base's are not"
            yield Attack(f"weights: {precision}", how, shares.get("base"), share)


def _unmeasured(name: str, why: str) -> Attack:
    return Attack(name, why, None, None)
