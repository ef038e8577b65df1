"""Multiple choice: which letter or choice a model answers, and how often that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bake.errors import ModelError
from bake.questions.forms import FORMS
from bake.questions.multiple_choice import LETTERS, Question
from bake.questions.prompts import Batch, Choice, Prompt, by_question
from bake.recipe import PromptForm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered right, 0 to 1, under each prompt form."""

    plain: float
    chat: float
    cloze: float | None = None
    """None where it was not measured."""

    def __post_init__(self) -> None:
        found = self.measured.values()
        if not all(0 <= of <= 1 for of in found):
            raise ValueError(f"accuracies {' and '.join(map(str, found))}; expected 0 to 1")

    @property
    def measured(self) -> dict[PromptForm, float]:
        """By form, what was measured."""
        each = {form: getattr(self, form) for form in FORMS}
        return {form: share for form, share in each.items() if share is not None}


@dataclass(frozen=True)
class LetterTokens:
    """The tokens that count as an answer: per letter A to D, one or more token ids."""

    chat: tuple[tuple[int, ...], ...]
    """The bare letter and the letter after a space."""
    plain: tuple[tuple[int, ...], ...]
    """The letter after a space."""


def letter_tokens(tokenizer: Any) -> LetterTokens:
    """The answer tokens of a tokenizer.

    Raises:
        ModelError: a letter is not one token of its own.
    """
    bare = [_single_token(tokenizer, letter) for letter in LETTERS]
    spaced = [_single_token(tokenizer, f" {letter}") for letter in LETTERS]
    chat = []
    for letter, ids in zip(LETTERS, zip(bare, spaced, strict=True), strict=True):
        known = tuple(dict.fromkeys(token for token in ids if token is not None))
        if not known:
            raise ModelError(_not_a_token(letter))
        chat.append(known)
    plain = []
    for letter, token in zip(LETTERS, spaced, strict=True):
        if token is None:
            raise ModelError(_not_a_token(f" {letter}"))
        plain.append((token,))
    return LetterTokens(chat=tuple(chat), plain=tuple(plain))


def _single_token(tokenizer: Any, text: str) -> int | None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _not_a_token(text: str) -> str:
    return (
        f'the base model\'s tokenizer has no single token for "{text}"; expected one for each '
        "of A to D, as Gemma's has, for multiple choice"
    )


def best_letters(logits: Tensor, letters: Sequence[Sequence[int]]) -> list[int]:
    """The letter with the largest logit, each letter at the better of its tokens.

    Args:
        logits: [batch, vocab], at the last real token.
        letters: per letter, its token ids.

    Returns:
        Per row, an index into A to D. Log-likelihoods differ from logits by a constant per row,
        so they choose the same.

    Source: Farrell et al., arXiv 2410.19278 (chat form); lm-evaluation-harness (plain form).
    """
    import torch

    per_letter = [logits[:, list(ids)].amax(dim=-1) for ids in letters]
    return [int(letter) for letter in torch.stack(per_letter, dim=-1).argmax(dim=-1)]


def letter_log_likelihoods(logits: Tensor, letters: LetterTokens) -> np.ndarray:
    """Log-likelihoods of each letter as the next token, bare and after a space.

    Args:
        logits: [n, vocab].
        letters: of the tokenizer.

    Returns:
        [n, 4, 2] float64, nats; -inf where the tokenizer has no such token.
    """
    normaliser = logits.double().logsumexp(dim=-1)
    found = np.full((len(logits), len(LETTERS), 2), -np.inf)
    for letter, (spaced,) in enumerate(letters.plain):
        for token in letters.chat[letter]:
            likelihood = logits[:, token].double() - normaliser
            found[:, letter, int(token == spaced)] = likelihood.numpy()
    return found


# --------------------------------------------------------------------------- choices' own texts

NORMALISED: dict[str, Callable[[Choice], int]] = {
    "summed": lambda choice: 1,
    "per_character": lambda choice: choice.n_characters,
    "per_token": lambda choice: choice.n_tokens,
}
"""What the log-likelihood of a choice's text is divided by. The first two are `acc` and `acc_norm`
of lm-evaluation-harness."""
DECIDES = "per_character"
"""Which of them says what was answered: a sum favours short choices, and a mean over tokens depends
on the tokenizer."""


def choice_log_likelihoods(losses: Tensor, prompts: Sequence[Prompt]) -> list[list[float]]:
    """Of each question, the log-likelihoods of its choices' texts, in nats.

    Args:
        losses: [m], nats: those of the choices' tokens, prompt by prompt.
        prompts: of a batch of choices.
    """
    found = []
    rest = iter(losses.tolist())
    for asked in by_question(prompts):
        found.append([-math.fsum(next(rest) for _ in prompt.answer_places) for prompt in asked])
    return found


def best_choice(
    log_likelihoods: Sequence[float], asked: Sequence[Prompt], by: str = DECIDES
) -> int:
    """The choice whose text is likeliest; of several, the first.

    Args:
        log_likelihoods: of the choices, in nats.
        asked: the prompts that end with them.
        by: a key of `NORMALISED`.
    """
    each = [
        of / NORMALISED[by](prompt.choice)
        for of, prompt in zip(log_likelihoods, asked, strict=True)
        if prompt.choice is not None
    ]
    return each.index(max(each))


# --------------------------------------------------------------------------- one engine's


@dataclass
class Answers:
    """What one engine answered, collected batch by batch."""

    letters: LetterTokens
    given: dict[tuple[str, str, int], int] = field(default_factory=dict)
    """(source, form, item) → index of the choice."""
    likelihoods: dict[tuple[str, int], list[list[float]]] = field(default_factory=dict)
    """(source, item) → [4, 2] nats, chat form: each letter as the next token, bare and after a
    space."""
    by_text: dict[tuple[str, str, int], dict[str, int]] = field(default_factory=dict)
    """(source, form, item) → by each of `NORMALISED`, the choice whose text is likeliest."""

    def add(self, batch: Batch, ends: Tensor, losses: Tensor) -> None:
        """Take in what was read of a batch; text is passed over.

        Args:
            batch: any.
            ends: [batch, vocab], the logits at the ends of its prompts; nothing of choices.
            losses: [m], nats, of its scored tokens.
        """
        self.take(batch, self.found(batch, ends, losses))

    def found(self, batch: Batch, ends: Tensor, losses: Tensor) -> list[Any]:
        """What they say, as JSON data: (row, index of the choice, log-likelihoods) per question."""
        if batch.of_choices:
            each = choice_log_likelihoods(losses, batch.prompts)
            asked = by_question(batch.prompts)
            chosen = [best_choice(*pair) for pair in zip(each, asked, strict=True)]
            return list(zip(range(0, len(batch.prompts), len(LETTERS)), chosen, each, strict=True))
        found: list[Any] = []
        for form in FORMS:
            rows = [row for row, prompt in enumerate(batch.prompts) if prompt.form == form]
            if not rows:
                continue
            last = ends[rows]
            chosen = best_letters(last, getattr(self.letters, form))
            likelihoods: list[Any] = [None] * len(rows)
            if form == "chat":
                likelihoods = letter_log_likelihoods(last, self.letters).tolist()
            found += zip(rows, chosen, likelihoods, strict=True)
        return found

    def take(self, batch: Batch, found: Iterable[Any]) -> None:
        """Take in what `found` gave for a batch."""
        for row, letter, likelihoods in found:
            prompt = batch.prompts[row]
            key = (prompt.source, prompt.form, prompt.item)
            self.given[key] = letter
            if batch.of_choices:
                asked = batch.prompts[row : row + len(LETTERS)]
                self.by_text[key] = {by: best_choice(likelihoods, asked, by) for by in NORMALISED}
            elif likelihoods is not None:
                self.likelihoods[prompt.source, prompt.item] = likelihoods

    def chosen(self, source: str, form: str, n: int) -> list[int]:
        """The choices given to the n questions of a source, in their order."""
        return [self.given[source, form, item] for item in range(n)]

    def accuracy(self, source: str, questions: Sequence[Question]) -> Accuracy:
        """Share of a source's questions that were answered right."""

        def share(form: str) -> float:
            chosen = self.chosen(source, form, len(questions))
            right = [a == question.answer for a, question in zip(chosen, questions, strict=True)]
            return sum(right) / len(right)

        return Accuracy(**{form: share(form) for form in FORMS if (source, form, 0) in self.given})
