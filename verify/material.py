"""What engines are shown: a recipe's questions and texts, ready for the tokenizer at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bake.recipe import Recipe
from verify.choices import LetterTokens, letter_tokens
from verify.kinds import ASKING, READING
from verify.open_prompts import load_prompts
from verify.prompts import Batch, Prompt, batches, question_prompts, text_prompts
from verify.questions import Question, load_questions, load_texts
from verify.trivia import load_trivia


@dataclass(frozen=True)
class Material:
    """What engines are shown."""

    questions: Mapping[str, Sequence[Question]]
    """Of `forget` and of `retain`."""
    windows: Sequence[Prompt]
    """Of text."""
    letters: LetterTokens
    tokenizer: Any
    """The base model's."""

    @property
    def pad_id(self) -> int:
        """What stands in front of shorter prompts."""
        return int(self.tokenizer.pad_token_id or 0)

    def prompts(self, kinds: frozenset[str]) -> list[Prompt]:
        """What every engine is shown for some kinds of evidence: texts, questions in both forms."""
        prompts = list(self.windows) if kinds & READING else []
        for source, questions in self.questions.items() if kinds & ASKING else ():
            prompts += question_prompts(
                source, questions, self.tokenizer, compared="parity" in kinds
            )
        return prompts

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[Batch]:
        """Prompts in batches of like length."""
        return batches(prompts, pad_id=self.pad_id, vocab_size=len(self.tokenizer))


def check_sources(recipe: Recipe, kinds: frozenset[str]) -> None:
    """Read what only the last kinds of evidence read: a bad row is known before hours of work.

    Raises:
        DataError: a source cannot be read, or a row of it is wrong.
    """
    assert recipe.verify is not None
    if "robustness" in kinds:
        for questions in recipe.verify.reworded.values():
            load_questions(questions, recipe)
    named = recipe.verify.completions
    if "completions" in kinds and named is not None:
        load_prompts(named.prompts, recipe, answered=True)
        if named.generic is not None:
            load_prompts(named.generic, recipe, answered=False)
        if named.trivia is not None:
            load_trivia(named.trivia, recipe, topic=None)


def load_material(recipe: Recipe, tokenizer: Any) -> Material:
    """Read a recipe's questions and texts.

    Raises:
        DataError: a source cannot be read, or a row of it is wrong.
        ModelError: the tokenizer is none that multiple choice can be asked with.
    """
    assert recipe.verify is not None
    questions = {
        "forget": load_questions(recipe.verify.forget_questions, recipe),
        "retain": load_questions(recipe.verify.retain_questions, recipe),
    }
    windows = text_prompts(load_texts(recipe.verify.text, recipe), tokenizer)
    return Material(questions, windows, letter_tokens(tokenizer), tokenizer)
